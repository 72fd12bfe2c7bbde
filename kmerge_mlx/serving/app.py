"""One connection: one request in, one answer out, mlx-lm's own but for what is said here.

Owns: routes, keys and origins, reading a body, usage and log-probabilities in OpenAI's form, and
turning whatever goes wrong into an answer. Parsing texts, streaming, tools: mlx-lm's handler.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import logging
import socket
import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm.server import APIHandler, CompletionRequest

from kmerge_mlx.serving.answers import ApiError, ClientGone, as_api_error, refused
from kmerge_mlx.serving.generator import Job
from kmerge_mlx.serving.http import DeadlineReader, is_gone
from kmerge_mlx.serving.logprobs import chat_logprobs, text_logprobs
from kmerge_mlx.serving.requests import DEFAULT_MODEL, read_body, read_completion
from kmerge_mlx.serving.service import Service

_log = logging.getLogger(__name__)
_COMPLETIONS = ("/v1/completions", "/v1/chat/completions", "/chat/completions")
_READS = ("/v1/models", "/health", "/metrics")
_ROUTES = dict.fromkeys(_COMPLETIONS, "POST") | dict.fromkeys(_READS, "GET")
_OPEN = ("/health",)
_MOST_DISCARDED = 64 * 2**20
_GONE = 499  # nginx's; nobody sees it but the metrics
_MODELS = "/v1/models"


class Handler(APIHandler):
    """Answers one request.

    Args:
        service: What it serves.
        arguments: The socket server's: socket, address, server.
    """

    default_request_version = "HTTP/1.0"  # before it, answers had no status
    # What an answer to a request needs that never arrived.
    requestline, command, path, request_version, headers = "-", "-", "", "HTTP/1.0", {}

    def __init__(self, service: Service, *arguments: Any):
        self.service = service
        self._started = time.monotonic()
        self._streaming = self._body_read = False
        self._status = _GONE
        self._job: Job | None = None
        super().__init__(service.generator, *arguments, system_fingerprint=service.fingerprint)

    def setup(self) -> None:
        """Puts a deadline on what the client sends."""
        super().setup()
        self.rfile.close()
        seconds = self.service.config.read_timeout
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, seconds))

    def handle(self) -> None:
        """Answers, and answers that nothing came in time."""
        self._answer(super().handle)

    def do_POST(self) -> None:
        """A completion."""
        self._answer(self._complete)

    def do_GET(self) -> None:
        """Models, health or metrics."""
        self._answer(self._look_up)

    def do_HEAD(self) -> None:
        """The same without its body."""
        self._answer(self._look_up)

    def do_OPTIONS(self) -> None:
        """What a browser asks before it lets a page call."""
        self._answer(super().do_OPTIONS)

    def send_error(self, code: int, message: str | None = None, explain: Any = None) -> None:
        """What the standard library refuses by itself: a bad request line, say."""
        if code == 501:
            self._check_route()
        malformed = code == 400 or message is None  # its own words hold what was sent
        self._refuse(ApiError(code, "the request is malformed" if malformed else message))

    def _answer(self, action: Callable[[], Any]) -> None:
        self._started = time.monotonic()
        try:
            action()
        except (ClientGone, ConnectionError, TimeoutError, BrokenPipeError):
            self._status = _GONE
        except Exception as error:
            answer = as_api_error(error)
            if answer.status == 500:
                _log.exception("a request failed")
            try:
                self._refuse(answer)
            except OSError:
                self._status = _GONE

    def finish(self) -> None:
        """Counts the request, and lets the client go."""
        if self._job is not None:
            self._count(self._job)
        if self.requestline != Handler.requestline:
            known = self._route if self._route in _ROUTES else "other"
            self.service.metrics.add("requests_total", 1, known, str(self._status))
        try:
            super().finish()
        except OSError:
            _log.debug("a client left before the end of its answer")

    @property
    def _route(self) -> str:
        try:
            return urlsplit(self.path).path
        except ValueError:  # no URL at all
            return self.path

    # What clients are told ---------------------------------------------------------------------

    def _refuse(self, error: ApiError) -> None:
        said = json.dumps(error.as_json()).encode()
        self._status = error.status
        if self._streaming:
            self.wfile.write(b"data: " + said + b"\n\n")
            return
        self._headers_buffer = []  # mlx-lm prepares an answer before it has one
        self._send(error.status, said, error.headers)
        self._discard()

    def _send(
        self,
        status: int,
        said: bytes,
        headers: Mapping[str, str] = MappingProxyType({}),
        kind: str = "application/json",
    ) -> None:
        self.send_response(status)
        self._set_cors_headers()
        for name, value in {"Content-Type": kind, "Content-Length": len(said), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)

    def _discard(self) -> None:
        """Reads on for a while: a client that still sends would not see the answer."""
        if self._body_read:
            return
        seconds = self.service.config.read_timeout
        end, left = time.monotonic() + seconds, _MOST_DISCARDED
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(min(1.0, seconds))
            while left > 0 and time.monotonic() < end and (got := self.connection.recv(2**16)):
                left -= len(got)

    def _look_up(self) -> None:
        self._check_client()
        self._check_route()
        if self._route == "/health":
            health = self.service.health
            said = json.dumps({"status": health}).encode()
            self._send(200 if health == "ok" else 503, said)
        elif self._route == "/metrics":
            text = self.service.metrics_text().encode()
            self._send(200, text, kind="text/plain; version=0.0.4; charset=utf-8")
        else:
            self._send(200, json.dumps(self._models()).encode())

    def _models(self) -> dict[str, Any]:
        name = self.service.model_name
        known = {"id": name, "object": "model", "created": self.created, "owned_by": "kmerge-mlx"}
        wanted = unquote(self._route.removeprefix(_MODELS).removeprefix("/"))
        if wanted not in ("", name, DEFAULT_MODEL):
            message = f"the model {wanted[:60]!a} is not served here, only {name} is"
            raise ApiError(404, message, param="model", code="model_not_found")
        return known if wanted else {"object": "list", "data": [known]}

    def _count(self, job: Job) -> None:
        metrics, now = self.service.metrics, time.monotonic()
        metrics.observe("request_duration_seconds", now - self._started)
        if job.first_token_at is not None:
            metrics.observe("time_to_first_token_seconds", job.first_token_at - self._started)
        metrics.add("prompt_tokens_total", sum(job.lengths))
        metrics.add("compressed_tokens_total", len(job.lengths))
        metrics.add("cached_tokens_total", job.cached_tokens)
        metrics.add("generated_tokens_total", job.generated)

    def version_string(self) -> str:
        """What the Server header says."""
        return "kmerge-mlx"

    def log_message(self, form: str, *args: Any) -> None:
        """Logs, instead of writing to stderr."""
        said = (form % args).translate(self._control_char_table)
        _log.info("%s %s", self.address_string(), said)

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begins an answer."""
        self._status = code
        super().send_response(code, message)

    def _set_cors_headers(self) -> None:
        if self.service.config.allowed_origins:
            super()._set_cors_headers()

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._streaming = True

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """Every error that mlx-lm's handler answers comes through here: it is answered in one way.

        mlx-lm says 404 whatever the generator raised.
        """
        if status_code < 400:
            super()._set_completion_headers(status_code)
            return
        error = sys.exception()
        raise refused(str(error)) if error is None or status_code == 400 else error

    # The way in ---------------------------------------------------------------------------------

    def _check_route(self) -> None:
        path = _MODELS if self._route.startswith(f"{_MODELS}/") else self._route
        if path not in _ROUTES:
            raise ApiError(404, f"there is no {self._route[:60]!a} here", code="not_found")
        if ("GET" if self.command == "HEAD" else self.command) != _ROUTES[path]:
            headers = {"Allow": _ROUTES[path]}
            raise ApiError(405, f"{path} takes {_ROUTES[path]} alone", headers=headers)

    def _check_client(self) -> None:
        """A page that a browser shows says where it is from; others say a key."""
        origin, allowed = self.headers.get("Origin"), self.service.config.allowed_origins
        if origin is not None and origin not in allowed and "*" not in allowed:
            message = "this origin may not call the server: see --allowed-origins"
            raise ApiError(403, message, code="origin_not_allowed")
        key = self.service.config.api_key
        if key is None or self._route in _OPEN:
            return
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
        if kind.lower() != "bearer" or not same:
            headers = {"WWW-Authenticate": "Bearer"}
            message = "the API key is missing or wrong"
            raise ApiError(401, message, code="invalid_api_key", headers=headers)

    def _body_length(self) -> int:
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            message = "the body must have a Content-Length, and no Transfer-Encoding"
            raise ApiError(411, message, code="length_required")
        if self.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body must not be compressed")
        length = lengths[0]
        if len({*lengths}) > 1:
            raise refused("there are several Content-Length headers")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise refused("the Content-Length header is no number of bytes")
        return int(length)

    def _read(self) -> bytes:
        length, most = self._body_length(), self.service.config.max_body_bytes
        if length > most:
            message = f"the body has {length:,} bytes, the server takes {most:,}"
            raise ApiError(413, message, code="body_too_large")
        self._body_read = True
        raw = self.rfile.read(length)
        if len(raw) < length:
            raise ClientGone("the body ended early")
        return raw

    def _complete(self) -> None:
        self._check_client()
        self._check_route()
        body = read_body(self._read())
        self._deadline = self._started + self.service.config.request_timeout
        self.connection.settimeout(self.service.config.read_timeout)
        with self.service.admitted():
            chat = self._route != "/v1/completions"
            served, vocab_size = self.service.model_name, self.service.vocab_size
            completion = read_completion(body, chat, served, vocab_size)
            self._job = self.service.job(completion, self._check_wanted)
            try:
                self._hand_over(completion.options | ({"messages": []} if chat else {"prompt": ""}))
            finally:
                self._job.cancel()

    def _hand_over(self, body: dict[str, Any]) -> None:
        """Lets mlx-lm read what is known to be good."""
        raw = json.dumps(body).encode()
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(raw))
        self.path = self._route
        sent, self.rfile = self.rfile, io.BytesIO(raw)
        try:
            super().do_POST()
        finally:
            self.rfile = sent

    def _check_wanted(self) -> None:
        if is_gone(self.connection):
            raise ClientGone("the client closed the connection")
        if time.monotonic() > self._deadline:
            seconds = self.service.config.request_timeout
            raise ApiError(504, f"the answer took more than {seconds:g} s", code="timeout")
        self.service.check()

    # What mlx-lm's handler asks for -------------------------------------------------------------

    def handle_chat_completions(self) -> CompletionRequest:
        """The request, laid out before."""
        super().handle_chat_completions()
        return self._job

    def handle_text_completions(self) -> CompletionRequest:
        """The request, laid out before."""
        super().handle_text_completions()
        return self._job

    def generate_response(self, *args: Any, **options: Any) -> dict:
        """mlx-lm's answer, or a piece of one, with usage and log-probabilities in OpenAI's form."""
        answer = super().generate_response(*args, **options)
        choice = answer["choices"][0]
        choice.pop("logprobs", None)
        if self.logprobs:
            form = text_logprobs if self.object_type == "text_completion" else chat_logprobs
            tokens, self._job.unsaid = self._job.unsaid, []
            choice["logprobs"] = form(tokens, self.service.tokenizer, max(self.top_logprobs, 0))
        if "usage" in answer:
            answer["usage"] = self._usage()
        message = choice.get("message")
        if message is not None and not message.get("tool_calls"):
            message["content"] = message.get("content") or ""  # OpenAI's null is for tool calls
        return answer

    def completion_usage_response(self, *args: Any, **options: Any) -> dict:
        """The last piece of a stream whose client asked for it."""
        answer = super().completion_usage_response(*args, **options)
        return answer | {"object": self.object_type, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(self._job.lengths)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._job.generated,
            "total_tokens": prompt + self._job.generated,
            "compressed_tokens": len(self._job.lengths),
            "prompt_tokens_details": {"cached_tokens": self._job.cached_tokens},
        }
