"""An S3 server in a process of its own, which may be killed, and a door before it that can be
shut."""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

AWS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run the server; yield its address."""
    process, url = _start(folder)
    try:
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _start(folder: Path, **more: str) -> tuple["subprocess.Popen[bytes]", str]:
    log = folder / "moto.log"
    with log.open("w") as file:
        command = [sys.executable, str(Path(__file__).with_name("_atomic_s3.py"))]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **more}
        )
    while "Running on http://" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    return process, log.read_text().partition("Running on ")[2].split()[0]


class Door:
    """Passes connections on to a server. Shut, it cuts those that are open and takes no new ones:
    to its clients the server was killed, while what it has stored outlives that."""

    def __init__(self, url: str) -> None:
        self.lead_to(url)
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.port, self.passed = 0, 0
        self.open()
        self.url = f"http://127.0.0.1:{self.port}"

    def lead_to(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
        self._server = (host, int(port))

    def open(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener, self.port = listener, listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open = []

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            self._open += [client, server]
            self.passed += 1
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class MortalServer:
    """A server behind a door. Killed, it comes back with what it had answered: it begins with the
    requests of which it has kept a record."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.record = folder, folder / "requests.jsonl"
        self.record.touch()
        self._process, url = self._start()
        self.door = Door(url)

    def kill_and_restart(self) -> None:
        """Kill it with -9 amid whatever it does, and bring it back."""
        self._process.kill()
        self._process.wait()
        self.door.shut()
        requests = [each for each in self.requests() if not _is_cut(each)]
        self.record.write_text("".join(f"{json.dumps(each)}\n" for each in requests))
        self._process, url = self._start()
        request = urllib.request.Request(f"{url}/moto-api/recorder/replay-recording", method="POST")
        urllib.request.urlopen(request, timeout=300).close()
        self.door.lead_to(url)
        self.door.open()

    def requests(self) -> list[dict[str, Any]]:
        """Return the requests on record, but for one that a kill has cut off; threads write them,
        and now and then two on one line."""
        text, found, end = self.record.read_text(), list[dict[str, Any]](), 0
        with contextlib.suppress(json.JSONDecodeError):
            while (end := text.find("{", end)) >= 0:
                request, end = json.JSONDecoder().raw_decode(text, end)
                found.append(request)
        return found

    def _start(self) -> tuple["subprocess.Popen[bytes]", str]:
        record = {"MOTO_RECORDER_FILEPATH": str(self.record), "MOTO_ENABLE_RECORDING": "1"}
        return _start(self._folder, **record)

    def end(self) -> None:
        """End it for good."""
        self.door.shut()
        self._process.kill()
        self._process.wait()


def _is_cut(request: dict[str, Any]) -> bool:
    """Return whether a client was gone before it had sent its whole request, which S3 refuses."""
    headers = {name.lower(): value for name, value in request["headers"].items()}
    return len(body_of(request)) < int(headers.get("content-length", 0))


def body_of(request: dict[str, Any]) -> bytes:
    """Return the body of a request on record."""
    body = request["body"] or ""
    return base64.b64decode(body) if request["body_encoded"] else body.encode()
