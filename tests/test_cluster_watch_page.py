"""Laws of the watch page's server: who may ask, for what, and what it asks Prometheus."""

import http.client
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _browser import browsing, needs_chromium

from cluster.monitoring.queries import MAX_LINES, PANELS, RUNS_QUERY, WINDOWS, fill_legend, finite
from cluster.watch import COOKIE, WatchPageConfig, WatchServer, open_server

TOKEN = "0123456789abcdef0123"
HOSTILE = '"><img src=x onerror=alert(1)>{{model}}</script>'


class FakePrometheus(http.server.ThreadingHTTPServer):
    """Answers what it is set to; `asked` lists the methods and paths, with their fields."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.status, self.body, self.headers = 200, b"", dict[str, str]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def tell(self, data: Any) -> None:
        """Answer with this data from now on."""
        self.body = json.dumps({"status": "success", "data": data}).encode()


class FakeHandler(http.server.BaseHTTPRequestHandler):
    server: Any  # a FakePrometheus

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        fields = dict(urllib.parse.parse_qsl(parts.query))
        self.server.asked.append((self.command, parts.path, fields))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.body)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def serving(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fake() -> Iterator[FakePrometheus]:
    yield from serving(FakePrometheus())


@pytest.fixture
def page(fake: FakePrometheus) -> Iterator[WatchServer]:
    yield from serving(open_server(WatchPageConfig(prometheus=fake.url, port=0)))


@pytest.fixture
def guarded(fake: FakePrometheus, tmp_path: Path) -> Iterator[WatchServer]:
    (tmp_path / "token").write_text(TOKEN + "\n")
    config = WatchPageConfig(prometheus=fake.url, port=0, token_file=str(tmp_path / "token"))
    yield from serving(open_server(config))


Answer = tuple[int, bytes, http.client.HTTPMessage]


def get(server: WatchServer, path: str, *, method: str = "GET", **headers: str) -> Answer:
    """Ask; `Host` as a header says another name than the server's own."""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    given = {"Host": f"127.0.0.1:{port}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.putrequest(method, path, skip_host=True)
    for name, value in given.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def line(labels: dict[str, str], *values: str) -> dict[str, Any]:
    return {"metric": labels, "values": [[i, value] for i, value in enumerate(values)]}


# -- what it serves --------------------------------------------------------------------------------


def test_a_panel_is_asked_for_by_its_key_and_the_query_is_the_servers(
    fake: FakePrometheus, page: WatchServer
):
    fake.tell({"result": [line({"model": "prior", "instance": "a:1"}, "1", "NaN", "+Inf")]})
    for key, panel in PANELS.items():
        status, body, _ = get(page, f"/api/lines?panel={key}&window=1h&query=up&match[]=up")
        assert status == 200
        method, path, fields = fake.asked[-1]
        assert (method, path) == ("GET", "/api/v1/query_range")
        assert fields["query"] == panel.query and fields.keys() == {"query", "start", "end", "step"}
        seconds = float(fields["end"]) - float(fields["start"])
        assert seconds == WINDOWS["1h"] and seconds / float(fields["step"]) <= 300
        (found,) = json.loads(body)["lines"]
        assert found["points"] == [[0, 1.0], [1, None], [2, None]], "JSON has no NaN"
        assert "{{" not in found["name"]


def test_nothing_else_is_passed_on(fake: FakePrometheus, page: WatchServer):
    refused = {
        "/api/lines": 400, "/api/lines?panel=training-0": 400, "/api/lines?panel=x&window=1h": 400,
        "/api/lines?panel=training-0&window=9y": 400, "/api/v1/query?query=up": 404,
        "/api/lines/../../api/v1/query?query=up": 404, "/api/v1/admin/tsdb/snapshot": 404,
        "//evil.test/": 404, "/watch.py": 404, "/../watch.py": 404, "/%2e%2e/metrics.py": 404,
    }  # fmt: skip
    for path, status in refused.items():
        assert get(page, path)[0] == status, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
        assert get(page, "/api/runs", method=method)[0] == 501, method
    assert fake.asked == []


def test_runs_and_alerts_are_shown_in_part(fake: FakePrometheus, page: WatchServer):
    def sample(name: str, value: str) -> dict[str, Any]:
        labels = {"__name__": f"minidalle2:train_{name}", "model": "prior", "instance": "a:1"}
        return {"metric": labels, "value": [0, value]}

    fake.tell({"result": [sample("running", "1"), sample("loss", "NaN")]})
    (run,) = json.loads(get(page, "/api/runs")[1])
    assert run == {"model": "prior", "instance": "a:1", "running": 1.0, "loss": None}
    assert fake.asked[-1][2] == {"query": RUNS_QUERY}
    alert = {
        "labels": {"alertname": "TargetDown", "severity": "warning", "secret": "s"},
        "annotations": {"summary": HOSTILE}, "state": "firing", "activeAt": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    fake.tell({"alerts": [alert]})
    (alert,) = json.loads(get(page, "/api/alerts")[1])
    assert alert.keys() == {"name", "state", "severity", "summary", "help", "since"}
    assert fake.asked[-1][1] == "/api/v1/alerts"


def test_many_lines_are_cut_and_their_number_shown(fake: FakePrometheus, page: WatchServer):
    fake.tell({"result": [line({"model": f"m{i:03d}"}, "1") for i in range(1000)]})
    found = json.loads(get(page, "/api/lines?panel=training-0&window=15m")[1])
    assert len(found["lines"]) == MAX_LINES and found["more"] == 1000 - MAX_LINES


def test_every_panel_is_in_the_layout_once(page: WatchServer):
    layout = json.loads(get(page, "/api/layout")[1])
    rows = [row for dashboard in layout["dashboards"] for row in dashboard["rows"]]
    keys = [panel["key"] for row in rows for panel in row["panels"]]
    assert sorted(keys) == sorted(PANELS)


def test_names_are_filled_once_whatever_the_labels_hold():
    legend, labels = "{{model}} {{instance}}", {"model": HOSTILE, "instance": "a"}
    assert fill_legend(legend, labels) == f"{HOSTILE} a" and fill_legend(legend, {}) == ""
    assert [finite(text) for text in ("1.5", "NaN", "-Inf")] == [1.5, None, None]


# -- Prometheus that is not well -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>hello", "is no Prometheus"),
        (200, b"[1, 2]", "is no Prometheus"),
        (200, b'{"status": "success"}', "is no Prometheus"),
        (200, b'{"status": "success", "data": {"result": [{}]}}', "is no Prometheus"),
        (200, b'{"status": "success", "data": {"result": [{"metric": 3}]}}', "is no Prometheus"),
        (422, b'{"status": "error", "error": "no such thing"}', "no such thing"),
        (200, b"x" * (9 << 20), "too much"),
        (302, b"", "is no Prometheus"),
    ],
)
def test_strange_answers_are_reported_in_a_line(
    fake: FakePrometheus, page: WatchServer, status: int, body: bytes, message: str
):
    fake.status, fake.body = status, body
    fake.headers = {"Location": f"{fake.url}/elsewhere"} if status == 302 else {}
    found, answer, _ = get(page, "/api/lines?panel=training-0&window=1h")
    assert found == 502 and message in json.loads(answer)["error"]
    assert "\n" not in json.loads(answer)["error"]
    assert len(fake.asked) == 1, "a redirect is not followed"
    fake.status, fake.headers = 200, {}
    fake.tell({"result": []})
    assert get(page, "/api/lines?panel=training-0&window=1h")[0] == 200, "and it goes on"


def test_a_prometheus_that_is_down_is_reported(page: WatchServer, fake: FakePrometheus):
    page.prometheus = type(page.prometheus)("http://127.0.0.1:9")
    for path in ("/api/runs", "/api/alerts", "/api/lines?panel=training-0&window=1h"):
        status, body, _ = get(page, path)
        assert status == 502 and "does not answer" in json.loads(body)["error"]
    assert get(page, "/")[0] == 200


# -- who may ask -----------------------------------------------------------------------------------


def test_a_name_that_was_made_to_point_here_is_refused(page: WatchServer, fake: FakePrometheus):
    port = page.server_address[1]
    for host in ("evil.test", f"evil.test:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        for path in ("/", "/api/runs", "/api/layout"):
            assert get(page, path, Host=host)[0] == 403, host
    assert get(page, "/", Host=f"LocalHost:{port}")[0] == 200
    assert fake.asked == []


def test_another_site_may_link_and_no_more(page: WatchServer, fake: FakePrometheus):
    fake.tell({"result": []})
    other = {"Sec_Fetch_Site": "cross-site"}
    assert get(page, "/api/runs", **other)[0] == 403
    assert get(page, "/", **other, Sec_Fetch_Mode="no-cors")[0] == 403
    assert get(page, "/api/runs", **other, Sec_Fetch_Mode="navigate")[0] == 403
    assert get(page, "/", **other, Sec_Fetch_Mode="navigate")[0] == 200
    assert get(page, "/api/runs", Sec_Fetch_Site="same-origin")[0] == 200


def test_without_the_token_nothing_is_to_be_had(guarded: WatchServer, fake: FakePrometheus):
    fake.tell({"result": []})
    paths = ["/", "/api/layout", "/api/runs", "/api/alerts"]
    paths += ["/api/lines?panel=training-0&window=1h"]
    wrong: list[dict[str, str]] = [
        {}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "},
        {"Cookie": f"{COOKIE}=wrong"}, {"Cookie": f"other={TOKEN}"}, {"Cookie": f"{COOKIE}=\xff"},
    ]  # fmt: skip
    for path in (*paths, f"/api/runs?token={TOKEN}", "/?token=", "/?token=wrong"):
        for headers in wrong:
            status, body, answered = get(guarded, path, **headers)
            assert status == 401 and b"minidalle2" not in body and not answered["Set-Cookie"]
    assert fake.asked == []
    for path in paths:
        assert get(guarded, path, Authorization=f"Bearer {TOKEN}")[0] in (200, 502)


def test_the_token_goes_into_a_cookie_and_out_of_the_address(guarded: WatchServer):
    status, body, headers = get(guarded, f"/?token={TOKEN}")
    assert (status, headers["Location"], body) == (303, "/", b"")
    assert {"HttpOnly", "SameSite=Strict"} <= set(headers["Set-Cookie"].split("; "))
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert get(guarded, "/", Cookie=f"a=b; {cookie}")[0] == 200


def test_others_may_reach_it_with_a_token_alone(tmp_path: Path):
    for address in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
        with pytest.raises(ValueError, match="--address.*--token-file"):
            open_server(WatchPageConfig(address=address, port=0))
    weak = tmp_path / "token"
    for text in ("", "short", "sixteen but with blanks", "0123456789abcdef;x"):
        weak.write_text(text)
        with pytest.raises(ValueError, match="--token-file"):
            open_server(WatchPageConfig(address="0.0.0.0", port=0, token_file=str(weak)))
    with pytest.raises(ValueError, match="--token-file"):
        open_server(WatchPageConfig(address="0.0.0.0", port=0, token_file=str(tmp_path / "none")))


def test_wrong_requests_are_one_line(page: WatchServer):
    with pytest.raises(ValueError, match="Address already in use"):
        open_server(WatchPageConfig(port=page.server_address[1]))
    for url in ("127.0.0.1:9090", "file:///etc/passwd", "http://"):
        with pytest.raises(ValueError, match="--prometheus"):
            open_server(WatchPageConfig(prometheus=url, port=0))
    with pytest.raises(ValueError, match="--every"):
        open_server(WatchPageConfig(every=0, port=0))
    with pytest.raises(ValueError, match="port 70000"):
        open_server(WatchPageConfig(port=70000))


def test_the_page_brings_everything_itself_and_runs_its_own_script_alone(page: WatchServer):
    _, body, headers = get(page, "/")
    text = body.decode()
    outside = text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in outside and "https://" not in outside
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == 2 and "frame-ancestors 'none'" in policy
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in text, "what comes from outside is set as text"
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.slow
@needs_chromium
def test_hostile_names_are_shown_and_do_nothing(fake: FakePrometheus, page: WatchServer):
    labels = dict.fromkeys(("model", "instance", "metric", "outcome", "of", "stage"), HOSTILE)
    running = {**labels, "__name__": "minidalle2:train_running"}
    alert = {
        "labels": {"alertname": HOSTILE, "severity": HOSTILE}, "state": HOSTILE,
        "annotations": {"summary": HOSTILE, "description": HOSTILE}, "activeAt": HOSTILE,
    }  # fmt: skip
    sample = {"metric": running, "value": [0, "1"], "values": [[0, "1"], [1, "2"]]}
    fake.tell({"result": [sample], "alerts": [alert]})
    with browsing(width=390) as view:
        view.tab.goto(f"http://{page.shown}/")
        for name in ("evaluation", "pipeline", "training"):
            view.tab.click(f'[data-name="{name}"]')
            view.tab.wait_for_selector(".card:not(.none) path", state="attached")
        assert HOSTILE in view.tab.inner_text("#alerts") and HOSTILE in view.tab.inner_text("#runs")
        view.tab.locator(".legend", has_text=HOSTILE).first.wait_for()
        assert view.tab.locator("img, iframe, object, link[rel=stylesheet]").count() == 0
        assert view.tab.locator("script").count() == 1
        assert view.tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert view.said == []
