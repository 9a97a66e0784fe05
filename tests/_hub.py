"""A server that speaks the few calls of the Hub that pushing and reading a run need.

One token opens it; without it a repository is not there. Files larger than 1 KB go by LFS.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field

from flask import Flask, Response, abort, jsonify, request
from werkzeug.serving import make_server

TOKEN = "hf_test"
LFS_BYTES = 1024


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub:
    """Serves on the loopback until it is closed; keeps its repositories in memory."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.refused = 0
        self._objects: dict[str, bytes] = {}
        self._server = make_server("127.0.0.1", 0, self._app(), threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()

    def _find(self, name: str) -> Repository:
        authorised = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not authorised or name not in self.repositories:
            self.refused += not authorised
            status = 404 if authorised else 401
            abort(Response("", status, {"X-Error-Code": "RepoNotFound"}))
        return self.repositories[name]

    def _describe(self, path: str, content: bytes) -> dict:
        sha = hashlib.sha256(content).hexdigest()
        entry = {"type": "file", "path": path, "oid": sha[:40], "size": len(content)}
        if len(content) > LFS_BYTES:
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        return entry

    def _app(self) -> Flask:
        app = Flask("hub")

        @app.post("/api/repos/create")
        def create():
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.refused += 1
                abort(401)
            wanted = request.get_json()
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            name = name if "/" in name else f"someone/{name}"
            status = 409 if name in self.repositories else 200
            private = wanted.get("visibility") == "private"
            self.repositories.setdefault(name, Repository(private=private))
            return jsonify(url=f"{self.url}/{name}", name=name, id=name), status

        @app.post("/api/validate-yaml")
        def validate():
            return jsonify(errors=[], warnings=[])

        @app.post("/api/models/<user>/<name>/preupload/<revision>")
        def preupload(user: str, name: str, revision: str):
            self._find(f"{user}/{name}")
            files = [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if each["size"] > LFS_BYTES else "regular"}
                for each in request.get_json()["files"]
            ]  # fmt: skip
            return jsonify(files=files)

        @app.post("/<user>/<name>.git/info/lfs/objects/batch")
        def batch(user: str, name: str):
            self._find(f"{user}/{name}")
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}}
                for each in request.get_json(force=True)["objects"]
            ]
            return jsonify(transfer="basic", objects=objects)

        @app.put("/lfs/<oid>")
        def put(oid: str):
            assert hashlib.sha256(request.data).hexdigest() == oid
            self._objects[oid] = request.data
            return ""

        @app.post("/api/models/<user>/<name>/commit/<revision>")
        def commit(user: str, name: str, revision: str):
            repository = self._find(f"{user}/{name}")
            for line in request.get_data().decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    repository.commits.append(value["summary"])
                elif entry["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                else:
                    repository.files[value["path"]] = self._objects[value["oid"]]
            oid = f"{len(repository.commits):040x}"
            url = f"{self.url}/{user}/{name}/commit/{oid}"
            return jsonify(success=True, commitOid=oid, commitUrl=url)

        self._add_reading(app)
        return app

    def _add_reading(self, app: Flask) -> None:
        @app.get("/api/models/<user>/<name>")
        @app.get("/api/models/<user>/<name>/revision/<revision>")
        def info(user: str, name: str, revision: str = "main"):
            repository = self._find(f"{user}/{name}")
            return jsonify(
                id=f"{user}/{name}", sha=f"{len(repository.commits):040x}",
                private=repository.private, tags=[], downloads=0, likes=0,
                siblings=[{"rfilename": path} for path in repository.files],
            )  # fmt: skip

        @app.post("/api/models/<user>/<name>/paths-info/<revision>")
        def paths_info(user: str, name: str, revision: str):
            files = self._find(f"{user}/{name}").files
            given = request.get_json(silent=True) or {}
            paths = given.get("paths") or request.form.getlist("paths")
            return jsonify([self._describe(path, files[path]) for path in paths if path in files])

        @app.get("/api/models/<user>/<name>/tree/<revision>")
        @app.get("/api/models/<user>/<name>/tree/<revision>/<path:below>")
        def tree(user: str, name: str, revision: str, below: str = ""):
            files, found = self._find(f"{user}/{name}").files, {}
            prefix = f"{below}/" if below else ""
            for path in (path for path in files if path.startswith(prefix)):
                folder, slash, _ = path.removeprefix(prefix).partition("/")
                found[folder] = (
                    {"type": "directory", "path": f"{prefix}{folder}", "oid": "0" * 40, "size": 0}
                    if slash
                    else self._describe(path, files[path])
                )
            if not found:
                abort(Response("", 404, {"X-Error-Code": "EntryNotFound"}))
            return jsonify(list(found.values()))

        @app.get("/<user>/<name>/resolve/<revision>/<path:path>")
        def resolve(user: str, name: str, revision: str, path: str):
            repository = self._find(f"{user}/{name}")
            if path not in repository.files:
                abort(Response("", 404, {"X-Error-Code": "EntryNotFound"}))
            content = repository.files[path]
            answer = Response(content, mimetype="application/octet-stream")
            answer.headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            answer.headers["X-Repo-Commit"] = f"{len(repository.commits):040x}"
            return answer.make_conditional(
                request, accept_ranges=True, complete_length=len(content)
            )
