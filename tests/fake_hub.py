"""A Hub of one process: just enough of its protocol to make repositories, commit files to them and download these."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """repositories: the files of each, by path."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 - one Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repositories.setdefault(name, {})
            self._answer({"url": f"http://{self.headers['Host']}/{name}"})
        elif "preupload" in parts:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "commit" in parts:
            lines = [json.loads(line) for line in body.splitlines() if line]
            for line in (line["value"] for line in lines if line["key"] == "file"):
                self.repositories["/".join(parts[2:4])][line["path"]] = base64.b64decode(line["content"])
            url = f"http://{self.headers['Host']}/{parts[2]}/{parts[3]}/commit/{COMMIT}"
            self._answer({"success": True, "commitUrl": url, "commitOid": COMMIT})
        else:
            self._answer({"errors": [], "warnings": []})  # of a model card

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner, name, *rest = self.path.strip("/").split("/")
        files = self.repositories.get(f"{owner}/{name}")
        if files is None or rest[-1] not in files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if files is None else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(files[rest[-1]])

    def _answer(self, record: dict) -> None:
        self._send(json.dumps(record).encode())

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def fake_hub() -> Iterator[str]:
    """The address of an empty Hub, as HF_ENDPOINT takes it."""
    FakeHub.repositories.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
