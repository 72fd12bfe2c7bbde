"""Enough of the Hugging Face hub, on the loopback, for ``huggingface_hub`` to use it; and how.

Large files lie in git as all others do: that the client can do otherwise is not ours to test.

Source: the requests of huggingface_hub 2.4; https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

from tests.cli_runner import Result

READ, WRITE = "read", "write"


def git_oid(data: bytes) -> str:
    """What ``git hash-object`` says of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repo: files by commit, and commits by branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False  # only tokens see it

    @classmethod
    def of(cls, folder: Path, private: bool = False) -> Repo:
        """A repo with one commit: the files of a folder."""
        repo = cls(private=private)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        repo.commit({p.relative_to(folder).as_posix(): p.read_bytes() for p in files})
        return repo

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Makes a commit that holds exactly these files; returns its name."""
        text = f"{self.refs.get(ref)} {sorted((n, git_oid(d)) for n, d in files.items())}"
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name

    def files(self, ref: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return self.commits[self.refs[ref]]


@dataclass
class Hub:
    """A running hub."""

    repos: dict[str, Repo]  # by user/name
    tokens: dict[str, str] = field(default_factory=dict)  # what each allows: read or write
    locked: set[str] = field(default_factory=set)  # gated repos, open to nobody
    refuse: dict[str, int] = field(default_factory=dict)  # status by route: info, tree, ...
    cut: set[str] = field(default_factory=set)  # files that break off half-way, every time
    requests: list[str] = field(default_factory=list)  # what was asked for, as METHOD path
    url: str = ""


@contextmanager
def running_hub(**repos: Path) -> Iterator[Hub]:
    """Serves folders as repos ``user/NAME`` until the block ends."""
    hub = Hub({f"user/{name}": Repo.of(folder) for name, folder in repos.items()})
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


class _Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str, message: str):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *_: object) -> None:
        """Says nothing: a test's output is its own."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(size)
        try:
            self._route([unquote(part) for part in path.split("/")])
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            if refused.status == 429:
                headers["Retry-After"] = "0"
            text = json.dumps({"error": refused.message}).encode()
            self._send(refused.status, text, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _route(self, parts: list[str]) -> None:
        if parts[:2] == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts[:3] == ["api", "repos", "create"]:
            return self._create()
        while parts[0] in ("api", "models", "datasets"):
            parts = parts[1:]
        name, route, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "info", parts[3:]
        if status := self.hub.refuse.get("info" if route == "revision" else route):
            raise _Refused(status, "", "refused")
        repo = self._repo(name)
        if self.command == "POST":
            self._need(WRITE)
            ref = rest[0]
            if route == "branch":
                repo.refs[ref] = repo.refs["main"]
                return self._json({})
            if route == "preupload":
                asked = json.loads(self.body)["files"]
                how = {"uploadMode": "regular", "shouldIgnore": False}
                return self._json({"files": [{"path": file["path"], **how} for file in asked]})
            return self._commit(name, repo, ref)
        commit, files = self._commit_of(repo, rest[0] if rest else "main")
        if route == "resolve":
            return self._file(commit, files, "/".join(rest[1:]))
        if route == "tree":
            about = [("file", path, len(data), git_oid(data)) for path, data in files.items()]
            names = ("type", "path", "size", "oid")
            return self._json([dict(zip(names, entry, strict=True)) for entry in about])
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "modelId": name, "sha": commit, "private": repo.private}
        return self._json(about | {"siblings": siblings})

    # ---- who may do what ----

    def _token(self) -> str | None:
        """What the request's token allows."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _need(self, wanted: str) -> None:
        allowed = self._token()
        if allowed is None:
            raise _Refused(401, "", "Invalid username or password.")
        if allowed != wanted:
            raise _Refused(403, "", "You don't have the rights to do that")

    def _repo(self, name: str) -> Repo:
        repo, token = self.hub.repos.get(name), self._token()
        if name in self.hub.locked:
            raise _Refused(401 if token is None else 403, "GatedRepo", "Access is restricted")
        if repo is None or (repo.private and token is None):
            status = 401 if token is None else 404
            raise _Refused(status, "RepoNotFound", "Repository not found")
        return repo

    def _commit_of(self, repo: Repo, ref: str) -> tuple[str, dict[str, bytes]]:
        commit = repo.refs.get(ref, ref)
        if commit not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {ref}")
        return commit, repo.commits[commit]

    # ---- downloads ----

    def _file(self, commit: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = files[path]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{git_oid(data)}"'}
        body = data[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        sent = body
        if path.rsplit("/", 1)[-1] in self.hub.cut and self.command == "GET":
            sent = b"" if start else data[: len(data) // 2]
            self.close_connection = True
        self._send(206 if start else 200, sent, headers, length=len(body))

    # ---- uploads ----

    def _create(self) -> None:
        self._need(WRITE)
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            there = {"error": "You already created this model repo"}
            return self._json(there | {"url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = repo = Repo(private=asked.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _commit(self, name: str, repo: Repo, ref: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        new = dict(self._commit_of(repo, ref)[1])
        for value, kind in ((line["value"], line["key"]) for line in lines):
            if kind == "header" and value.get("parentCommit", repo.refs[ref]) != repo.refs[ref]:
                raise _Refused(412, "", "A commit has happened since. Please refresh and try again")
            if kind == "file":
                new[value["path"]] = base64.b64decode(value["content"])
        oid = repo.commit(new, ref)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self._json({"success": True, "commitUrl": url, "commitOid": oid})

    # ---- answers ----

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):  # a killed client
            self.wfile.write(body)


# Nothing here may wait for the real hub: no proxies, no telemetry, no second transport.
QUIET = {
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "NO_PROXY": "*",
}


def settings(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that uses a hub, with a cache and a login of its own."""
    return QUIET | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}


@contextmanager
def using(hub: Hub, home: Path, token: str | None = None, **more: Any) -> Iterator[None]:
    """Lets this process use a hub: what the client reads from its environment when imported.

    ``home`` holds its cache; another one is another machine. ``more``: constants of the client.
    """
    ours = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ours | more).items():
            patch.setattr(constants, name, value)
        patch.setenv("NO_PROXY", "*")
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        close_session()
        yield
    close_session()


def assert_said(result: Result, line: str) -> None:
    """Checks that a command failed with exactly this line."""
    assert (result.code, result.out, result.err) == (1, "", f"error: {line}\n")
