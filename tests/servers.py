"""Servers for tests: in this process, which is quick, or in one of their own, which is real."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

from kmerge_mlx.serving.app import Server
from kmerge_mlx.serving.settings import ServeSettings
from tests.cli_runner import command, environment

FIXTURE_EOS = 0
SHORT = {"prompt": "x", "max_tokens": 1}
PATIENCE = 60  # seconds for what comes in a moment on an idle machine


@dataclass
class Answer:
    """An HTTP answer; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, response: http.client.HTTPResponse) -> Answer:
        headers = {name.lower(): value for name, value in response.getheaders()}
        return cls(response.status, headers, response.read())

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, whose form is checked."""
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        assert "Traceback" not in error["message"]
        return error


@dataclass
class Address:
    """Where a server is, and what a test asks of it."""

    port: int
    server: Server | None = None  # in this process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Sends one request; a body that is not bytes is sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with closing(connection):
            connection.request(method, path, body, headers or {})
            return Answer.of(connection.getresponse())

    def complete(self, **body: Any) -> Answer:
        return self.request("POST", "/v1/completions", body)

    def chat(self, content: Any, **body: Any) -> Answer:
        messages = [{"role": "user", "content": content}]
        return self.request("POST", "/v1/chat/completions", {"messages": messages} | body)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = self.request("GET", "/metrics").body.decode()
        found = re.findall(rf"^kmerge_mlx_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=PATIENCE)

    def open_stream(self, until: bytes = b"data: {", **body: Any) -> socket.socket:
        """Begins a streamed completion, and returns once its first token is here."""
        connection = self.connect()
        connection.sendall(post({"stream": True} | body))
        receive_until(connection, lambda got: until in got)
        return connection

    def assert_alive(self) -> None:
        """The server still answers."""
        assert self.request("GET", "/health").status == 200
        answer = self.complete(prompt="Is it alive?", max_tokens=2)
        assert answer.status == 200, answer.body
        assert answer.json["usage"]["completion_tokens"] in (1, 2)


@contextmanager
def serving(
    base: Path | str, adapter: Path | str | None, k: int | None = None, **settings: Any
) -> Iterator[Address]:
    """A server in this process."""
    source = {"model": str(base), "adapter_path": adapter and str(adapter), "k": k}
    with Server(ServeSettings(**{"port": 0} | source | settings)) as server:
        yield Address(server.port, server)


@dataclass
class Process:
    """A server in a process of its own, and its lines on stderr so far."""

    process: subprocess.Popen
    address: Address
    said: list[str] = field(default_factory=list)

    def wait(self) -> int:
        """The exit code."""
        self.said += self.process.communicate(timeout=PATIENCE)[1].splitlines()
        return self.process.returncode


@contextmanager
def serving_process(*args: object, **changes: str) -> Iterator[Process]:
    """``kmerge-mlx serve`` in a process of its own, once it listens."""
    line = command("serve", "--port", 0, "--log-level", "ERROR", *args)
    process = subprocess.Popen(
        line, env=environment(**changes), stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        said: list[str] = []
        while not (said and said[-1].startswith("Serving ")):
            text = process.stderr.readline()
            assert text, (process.wait(), said)
            said.append(text.rstrip())
        yield Process(process, Address(int(re.search(r":(\d+)/v1$", said[-1])[1])), said)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()


def long_answer(**more: Any) -> dict[str, Any]:
    """A request whose answer takes long: the fixture's model may not end it."""
    no_end = {"logit_bias": {str(FIXTURE_EOS): -100}}
    return {"prompt": [7, 8, 9], "merge": False, "max_tokens": 2000} | no_end | more


def head(path: str = "/v1/completions", **headers: object) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def post(body: dict[str, Any], **headers: object) -> bytes:
    """A completion's request as it is sent."""
    raw = json.dumps(body).encode()
    return head(Content_Length=len(raw), **headers) + raw


def read_answer(connection: socket.socket) -> Answer:
    """Reads the next answer of a connection that may stay open."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return Answer.of(response)


def exchange(server: Address, raw: bytes) -> Answer:
    """Sends bytes as they are."""
    with server.connect() as connection:
        connection.sendall(raw)
        return read_answer(connection)


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the other side ends."""
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def receive_until(connection: socket.socket, enough: Callable[[bytes], bool]) -> None:
    """Receives until what came is enough."""
    got = b""
    while not enough(got):
        piece = connection.recv(65_536)
        assert piece, got
        got += piece


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until something is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.02)
