"""What is submitted again and what is not, with a head of the test's own that answers as Ray's."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import supervise
from cluster.base.cli import DONE, INCOMPLETE, WRONG_REQUEST
from cluster.supervise import SuperviseConfig

ROOT = Path(__file__).resolve().parent.parent
Ending = tuple[str, int | None, str]  # status, exit code, message
COMMAND = ["python", "training/prior.py", "--run", "/data/runs/a b"]


class FakeHead(http.server.ThreadingHTTPServer):
    """Answers as Ray's dashboard does. `endings`: what becomes of each submission, in order, of
    status, exit code and message; `away`: how many requests it breaks off, the next ones."""

    daemon_threads = True

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.endings: list[Ending] = []
        self.dead_nodes: set[str] = set()
        self.stopped: list[str] = []
        self.away = 0
        self.loses_answers = False
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, entry: str, ending: Ending) -> None:
        status, code, message = ending
        self.jobs[name] = {
            "type": "SUBMISSION", "submission_id": name, "entrypoint": entry, "status": status,
            "message": message, "driver_exit_code": code, "driver_node_id": f"node of {name}",
            "start_time": int(time.time() * 1000), "metadata": {}, "runtime_env": {},
        }  # fmt: skip

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of requests that are broken off."""


class Answers(http.server.BaseHTTPRequestHandler):
    @property
    def head(self) -> FakeHead:
        assert isinstance(self.server, FakeHead)
        return self.server

    def answer(self, found: object, status: int = 200) -> None:
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def is_away(self) -> bool:
        self.head.away -= 1
        return self.head.away >= 0

    def do_GET(self) -> None:
        if self.is_away():
            return
        path, _, name = self.path.partition("?")[0].rpartition("/")
        if self.path == "/api/version":
            self.answer({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})
        elif self.path == "/api/jobs/":
            self.answer([*self.head.jobs.values()])
        elif path == "/api/jobs" and name in self.head.jobs:
            self.answer(self.head.jobs[name])
        elif "/nodes" in self.path:
            dead = [n for n in self.head.dead_nodes if n.replace(" ", "%20") in self.path
                    or n.replace(" ", "+") in self.path]  # fmt: skip
            state = {"node_id": "x", "node_ip": "", "is_head_node": True, "node_name": "",
                     "state": "DEAD" if dead else "ALIVE", "state_message": "",
                     "resources_total": {}, "labels": {}}  # fmt: skip
            result = {"result": [state], "total": 1, "num_after_truncation": 1, "num_filtered": 1}
            self.answer({"result": True, "msg": "", "data": {"result": result}})
        else:
            self.answer(f"Job {name} does not exist", 404)

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        if self.path.endswith("/stop"):
            name = self.path.split("/")[-2]
            self.head.stopped.append(name)
            self.head.jobs[name]["status"] = "STOPPED"
            return self.answer({"stopped": True})
        name = sent["submission_id"]
        if name in self.head.jobs:
            return self.answer(f"ValueError: Job with submission_id {name} already exists.", 500)
        self.head.add(name, sent["entrypoint"], self.head.endings.pop(0))
        self.head.away = max(self.head.away, int(self.head.loses_answers))
        if not self.is_away():  # else it was heard, and died before it said so
            self.answer({"job_id": name, "submission_id": name})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHead]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("POLL_SECONDS", "PENDING_SECONDS", "LONGEST_PAUSE_SECONDS", "CONNECT_SECONDS"):
        monkeypatch.setattr(supervise, name, 0.01)
    server = FakeHead()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(head: FakeHead, *endings: Ending, **fields: Any) -> int:
    head.endings += endings
    config = SuperviseConfig(address=head.url, name=fields.pop("name", "p"), **fields)
    return supervise.main(config, COMMAND)


def test_a_command_that_succeeds_is_submitted_once_as_a_shell_reads_it(head: FakeHead, capsys):
    assert run(head, ("SUCCEEDED", 0, "done")) == DONE
    assert [*head.jobs] == ["p-1"]
    assert head.jobs["p-1"]["entrypoint"] == "python training/prior.py --run '/data/runs/a b'"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("p-1: succeeded after")


@pytest.mark.parametrize("code", [2, 126, 127])
def test_a_request_that_is_wrong_is_not_repeated(code: int, head: FakeHead, capsys):
    message = "error: --embeds: found nothing\nRunning entrypoint for job p-1: python"
    assert run(head, ("FAILED", code, message)) == WRONG_REQUEST
    assert [*head.jobs] == ["p-1"]
    assert f"refused with exit code {code} (error: --embeds: found" in capsys.readouterr().out


@pytest.mark.parametrize("code", [None, 1, 137, -9])
def test_what_was_killed_or_left_incomplete_is_submitted_again(code: int | None, head: FakeHead):
    assert run(head, ("FAILED", code, "x"), ("FAILED", code, "x"), ("SUCCEEDED", 0, "")) == DONE
    assert [*head.jobs] == ["p-1", "p-2", "p-3"]


def test_it_gives_up_after_attempts_without_progress(head: FakeHead, capsys):
    assert run(head, *[("FAILED", 1, "full disk")] * 3, max_attempts=3) == INCOMPLETE
    assert "the last of 3 attempts without progress" in capsys.readouterr().err
    assert run(head, *[("FAILED", 1, "")] * 3, ("SUCCEEDED", 0, ""), max_attempts=2,
               progress_seconds=0, name="q") == DONE  # fmt: skip


def test_deaths_of_the_head_are_no_attempts_without_progress(head: FakeHead):
    head.loses_answers = True
    endings = [*[("FAILED", None, "its node died")] * 5, ("SUCCEEDED", 0, "")]
    assert run(head, *endings, max_attempts=2) == DONE and len(head.jobs) == 6


def test_a_stop_that_was_asked_for_is_the_end(head: FakeHead):
    message = "run: stopped on request, at a checkpoint; rerun the same command to continue"
    assert run(head, ("FAILED", 1, message)) == INCOMPLETE
    assert run(head, ("STOPPED", None, ""), name="q") == INCOMPLETE
    assert [*head.jobs] == ["p-1", "q-1"]


def test_a_job_that_runs_on_a_dead_node_is_submitted_again(head: FakeHead, capsys):
    """As Ray reports it after the return of a head: the state of before, until it is asked."""
    head.dead_nodes = {"node of p-1"}
    assert run(head, ("RUNNING", None, ""), ("SUCCEEDED", 0, "")) == DONE
    assert [*head.jobs] == ["p-1", "p-2"] and "its node died" in capsys.readouterr().out


def test_a_head_that_is_away_is_waited_for(head: FakeHead, capsys):
    server, first = supervise.Head(head.url, 60.0), "r-1"
    assert server.ask(lambda client: client.list_jobs()) == []
    head.away = 6
    assert server.ask(lambda client: client.list_jobs()) == [] and server.num_absences == 1
    # The answer to a submission gets lost: the job is not submitted twice, and as nobody starts
    # what a dead head was asked for, it is stopped and submitted under another name
    head.endings.append(("PENDING", None, ""))
    head.away = 1
    supervise._submit(server, SuperviseConfig(), first, "true")
    assert server.num_absences == 2 and [*head.jobs] == [first]
    ending, worked = supervise._follow(server, first, num_absences=1)
    assert worked == 0 and ending.is_lost and head.stopped == [first]
    output = capsys.readouterr().out
    assert "the head does not answer" in output and "the head answers" in output


def test_a_head_that_lost_its_jobs_gets_them_again(head: FakeHead):
    ending, _ = supervise._follow(supervise.Head(head.url, 1.0), "p-1", 0)
    assert ending.is_lost


def test_started_again_it_follows_what_runs(head: FakeHead, capsys):
    entry = "python training/prior.py --run '/data/runs/a b'"
    head.add("p-1", entry, ("FAILED", 1, ""))
    head.add("p-2", entry, ("RUNNING", None, ""))

    def finish() -> None:
        time.sleep(0.1)
        head.jobs["p-2"]["status"] = "SUCCEEDED"

    threading.Thread(target=finish).start()
    assert run(head) == DONE and [*head.jobs] == ["p-1", "p-2"]
    assert "p-2: runs" in capsys.readouterr().out
    head.add("q-7", "sleep 1", ("RUNNING", None, ""))
    with pytest.raises(ValueError, match="--name q: found it running 'sleep 1', expected"):
        run(head, name="q")


def test_a_name_is_of_its_command():
    names = {supervise._name_of(command) for command in (COMMAND, [*COMMAND, "-x"], ["true"])}
    assert len(names) == 3 and supervise._name_of(COMMAND).startswith("prior-")


def script(head: FakeHead, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "cluster" / "supervise.py"), "--address", head.url]
    return subprocess.Popen(
        [*command, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip


def test_an_interrupt_stops_the_job_and_sigterm_leaves_it(head: FakeHead):
    head.endings.append(("RUNNING", None, ""))
    process = script(head, "--name", "q", "--", "sleep", "100")
    assert process.stdout is not None and "submitted" in process.stdout.readline()
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM and head.stopped == []
    head.endings.append(("RUNNING", None, ""))
    process = script(head, "--name", "p", "--", "sleep", "100")
    assert process.stdout is not None and "submitted" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == INCOMPLETE and head.stopped == ["p-1"]
    assert output == "p-1: stopped\n" and errors.startswith("interrupted; rerun")


def test_a_head_that_accepts_and_says_nothing_is_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervise, "CONNECT_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = supervise.Head(f"http://127.0.0.1:{silent.getsockname()[1]}", 60.0)
        with pytest.raises(OSError, match="found no head within .*no answer within 0 s"):
            server.ask(lambda client: client.list_jobs(), seconds=0.2)
    assert server.num_absences >= 1


def test_what_a_proxy_says_of_a_head_that_is_away_is_no_refusal():
    passing = ("404: default backend", "429: slow down", "500: a RuntimeError: status code 404")
    for text in passing:
        supervise._raise_refusal(f"Request failed with status code {text}.")
    with pytest.raises(LookupError):
        supervise._raise_refusal("Request failed with status code 404: Job p-1 does not exist.")
    with pytest.raises(ValueError, match="found status 400"):
        supervise._raise_refusal("Request failed with status code 400: no such thing.")


def test_what_is_wrong_on_its_own_command_line_is_one_line(head: FakeHead):
    for arguments, message in (
        ((), "error: found no command, expected one after --"),
        (("python", "training/prior.py"), "error: found no command, expected one after --"),
        (("--max-attempts", "0", "--", "true"), "--max-attempts: found 0, expected 1 or more"),
        (("--entrypoint-resources", "{", "--", "true"), "--entrypoint-resources: found Expecting"),
        (("--nmae", "x", "--", "true"), "did you mean --name?"),
    ):
        output, errors = script(head, *arguments).communicate(timeout=60)
        assert errors.count("\n") == 1 and message in errors and output == ""
    assert head.jobs == {}


def test_no_head_at_all_is_one_line(head: FakeHead):
    with pytest.raises(OSError, match="found no head within .*, expected one; start it, or name"):
        supervise.Head("http://127.0.0.1:1", 60.0).ask(lambda client: client.list_jobs())
