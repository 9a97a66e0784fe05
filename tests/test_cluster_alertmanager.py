"""An alert reaches whom Alertmanager names: Debian's Prometheus and Alertmanager, live."""

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from _prometheus import configuration, free_port, needs_prometheus, prometheus, wait_for

ALERTMANAGER = shutil.which("prometheus-alertmanager")


@contextmanager
def pager() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield an address, and the list of what is posted to it."""
    posts: list[dict[str, Any]] = []

    class Taking(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Taking)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", posts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def alertmanager(folder: Path, port: int, address: str) -> Iterator[None]:
    """Run Alertmanager by the repository's configuration, with an address for its receiver."""
    path = folder / "alertmanager.yaml"
    config = yaml.safe_load(path.read_text())
    config["receivers"][0]["webhook_configs"] = [{"url": address}]
    config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    path.write_text(yaml.safe_dump(config))
    command = [
        str(ALERTMANAGER), f"--config.file={path}", f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=",
    ]  # fmt: skip
    with (folder / "alertmanager.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
@needs_prometheus
@pytest.mark.skipif(ALERTMANAGER is None, reason="Debian's prometheus-alertmanager is absent")
def test_whom_it_names_hears_of_an_alert_and_of_its_end(tmp_path: Path):
    target, port = free_port(), free_port()
    config = configuration(tmp_path, minidalle2=[{"targets": [f"127.0.0.1:{target}"]}])
    config.write_text(config.read_text().replace("127.0.0.1:9093", f"127.0.0.1:{port}"))
    rules = tmp_path / "alerts.yaml"
    content = yaml.safe_load(rules.read_text())
    for rule in (rule for group in content["groups"] for rule in group["rules"]):
        rule["for"] = "1s"
    rules.write_text(yaml.safe_dump(content))
    with pager() as (address, posts), alertmanager(tmp_path, port, address), prometheus(config):

        def is_posted(status: str) -> bool:
            alerts = [alert for post in posts for alert in post["alerts"]]
            return any(
                alert["labels"]["alertname"] == "TargetDown" and alert["status"] == status
                for alert in alerts
            )

        wait_for(lambda: is_posted("firing"), "the alert", 120)
        (summary,) = {
            alert["annotations"]["summary"] for post in posts for alert in post["alerts"]
        }  # fmt: skip
        assert summary == f"minidalle2: 127.0.0.1:{target} does not answer"
        (tmp_path / "minidalle2.json").write_text("[]")  # it is not expected to answer any more
        wait_for(lambda: is_posted("resolved"), "its end", 120)
