"""Enough of the Hugging Face hub, on the loopback, for ``huggingface_hub`` to fetch a repo from it.

Owns: the three routes that ``snapshot_download`` asks for (a revision, its file tree, a file whole
or from a byte on), and the ways in which a hub fails. Knows nothing of this project.

Source: the requests of huggingface_hub 2.4, and https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """A running hub.

    Args:
        repos: Repo id to the folder that holds its files; one that is not named answers 404.
        locked: Repo ids that answer 401.
        cut: Names of files whose connection is cut half-way, and again at every resumption.
        requests: What was asked for, as ``METHOD path``.
    """

    repos: dict[str, Path]
    locked: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def running_hub(**repos: Path) -> Iterator[Hub]:
    """Serves folders as repos ``user/NAME`` until the block ends."""
    hub = Hub({f"user/{name}": folder for name, folder in repos.items()})
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 20

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Says nothing: a test's output is its own."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        for prefix in ("api/models/", "api/datasets/", "datasets/"):
            path = path.removeprefix(prefix)
        parts = path.split("/")
        repo, route = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
        folder = self.hub.repos.get(repo)
        if repo in self.hub.locked:
            return self._refuse(401, "GatedRepo", "Invalid credentials in Authorization header")
        if folder is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if route == "resolve":
            return self._file(folder / "/".join(parts[4:]))
        if route == "tree":
            return self._json([_entry(file, folder) for file in _files(folder)])
        siblings = [{"rfilename": _name(file, folder)} for file in _files(folder)]
        return self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

    def _file(self, file: Path) -> None:
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data = file.read_bytes()
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        start = int(wanted.split("-")[0])
        body = data[start:]
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if file.name in self.hub.cut:
            sent = b"" if start else data[: len(data) // 2]
            self._send(206 if start else 200, sent, headers, length=len(body))
            self.close_connection = True
            return None
        return self._send(206 if start else 200, body, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _entry(file: Path, folder: Path) -> dict[str, object]:
    data = file.read_bytes()
    return {
        "type": "file",
        "path": _name(file, folder),
        "size": len(data),
        "oid": hashlib.sha1(data).hexdigest(),
    }
