"""The HTTP server: routes, keys and origins, connections, and how it starts and ends."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import time
from contextlib import AbstractContextManager
from functools import partial
from http import HTTPStatus
from threading import Thread
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from kmerge_mlx.errors import KMergeError, ServeError, first_line
from kmerge_mlx.serving.answers import ApiError, ClientGone, as_api_error, busy, event
from kmerge_mlx.serving.service import Service
from kmerge_mlx.serving.settings import ServeSettings

_log = logging.getLogger(__name__)

_LEFT = 499  # nginx's status for a client that left; only the metrics show it
_MOST_PIPELINED = 2**16
_LINGER_SECONDS = 1.0
_STREAM = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
_STREAM += [(b"x-accel-buffering", b"no")]  # nginx would hold the pieces back


def make_app(service: Service) -> ASGIApp:
    """The routes, whose requests are counted by route and status."""
    check, started = [Depends(partial(_check_client, service))], int(time.time())
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    for kind in (ApiError, KMergeError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _as_response)
    if origins := list(service.settings.allowed_origins):
        own = {"allow_origins": origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **own)
    get = partial(app.api_route, methods=["GET", "HEAD"], dependencies=check)
    post = partial(app.post, dependencies=check)

    @get("/health")
    async def health() -> Response:
        found = service.health
        return JSONResponse({"status": found}, 200 if found == "ok" else 503)

    @get("/metrics")
    async def metrics() -> Response:
        text = generate_latest(service.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @get("/v1/models")
    @get("/v1/models/{wanted:path}")
    async def models(wanted: str = "") -> Response:
        name = service.provider.name
        known = {"id": name, "object": "model", "created": started, "owned_by": "kmerge-mlx"}
        if wanted and wanted not in service.provider.names:
            message = f"the model {wanted[:60]!a} is not served here, only {name} is"
            raise ApiError(404, message, "model", "model_not_found")
        return JSONResponse(known if wanted else {"object": "list", "data": [known]})

    @post("/v1/completions")
    @post("/v1/chat/completions")
    @post("/chat/completions")
    async def complete(request: Request) -> Response:
        chat = request.url.path.endswith("/chat/completions")
        return _Completing(service, await _read_body(request, service.settings), chat)

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        status, connection = _LEFT, scope["state"]["connection"]
        # Clients add "/chat/completions" to an address that may end in a slash.
        scope["path"] = "/" + "/".join(filter(None, scope["path"].split("/")))

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, receive, noting)
        finally:
            status = _LEFT if scope["state"].get("left") else status
            # FastAPI leaves the route here: what a client made up is not a label.
            route = getattr(scope.get("route"), "path", "other").split("/{")[0]
            if not connection.refused:  # that was counted
                service.metrics.requests.labels(route, str(status)).inc()

    return counting


async def _as_response(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_LEFT)
    if isinstance(error, HTTPException):
        asked, headers = repr(request.url.path[:60]), error.headers
        error = ApiError(404, f"there is no {asked} here", code="not_found")
        if headers:
            message = f"{asked} takes {headers['Allow']}, not {request.method}"
            if request.method == "OPTIONS" and "Origin" in request.headers:
                message += ": to let a web page of this origin call, see --allowed-origins"
            error = ApiError(405, message, code="method_not_allowed", headers=dict(headers))
    answer = as_api_error(error)
    _note(answer, f"{request.method} {request.url.path}")
    if request.state.connection.cycle.waiting_for_100_continue:
        # A client that has its answer may or may not send the body that it announced.
        answer.headers = answer.headers | {"Connection": "close"}
    return JSONResponse(answer.as_json(), answer.status, answer.headers)


def _note(error: ApiError, asked: str) -> None:
    """Logs why a request was refused, in printable letters."""
    _log.info("%r got %d: %r", asked[:80], error.status, str(error))


async def _check_client(service: Service, request: Request) -> None:
    """A page in a browser names its origin; other clients send a key."""
    origin, allowed = request.headers.get("Origin"), service.settings.allowed_origins
    if origin is not None and origin not in allowed and "*" not in allowed:
        message = "this origin may not call the server: see --allowed-origins"
        raise ApiError(403, message, code="origin_not_allowed")
    if service.key is None or request.url.path == "/health":
        return
    kind, _, given = request.headers.get("Authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), service.key.encode())
    if kind.lower() != "bearer" or not same:
        headers = {"WWW-Authenticate": "Bearer"}
        message = "the API key is missing or wrong"
        raise ApiError(401, message, code="invalid_api_key", headers=headers)


async def _read_body(request: Request, settings: ServeSettings) -> bytes:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body must not be compressed")
    most, body = settings.max_body_bytes, bytearray()
    message = f"the body is larger than the {most:,} bytes that the server takes"
    too_large = ApiError(413, message, code="body_too_large")
    if int(request.headers.get("Content-Length", 0)) > most:
        raise too_large
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise too_large
    return bytes(body)


class _Completing(Response):
    """Answers one completion; unlike FastAPI's responses it sees the client leave at any moment."""

    def __init__(self, service: Service, asked: bytes, chat: bool):
        super().__init__()
        self.service, self.asked, self.chat = service, asked, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection, begun, lock = scope["state"]["connection"], False, asyncio.Lock()

        async def put(message: Message) -> None:
            try:
                async with asyncio.timeout(self.service.settings.read_timeout):
                    await send(message)
            except TimeoutError:
                raise ClientGone("the client does not read") from None

        async def write(text: str, last: bool = False) -> None:
            nonlocal begun
            body = {"type": "http.response.body", "body": text.encode(), "more_body": not last}
            async with lock:  # a request may have several prompts
                if not begun:
                    await put({"type": "http.response.start", "status": 200, "headers": _STREAM})
                    begun = True
                await put(body)

        connection.answering = asyncio.current_task()
        try:
            try:
                whole = await self.service.answer(self.asked, self.chat, connection.arrived, write)
                await (write("", last=True) if begun else JSONResponse(whole)(scope, receive, put))
            except (ApiError, KMergeError) as error:
                if not begun:
                    raise
                answer = as_api_error(error)
                _note(answer, "a stream")
                await write(event(answer.as_json()), last=True)
        except (ClientGone, asyncio.CancelledError):
            connection.answering, scope["state"]["left"] = None, True
            connection.transport.abort()
            await asyncio.sleep(0)  # uvicorn sees the end of the connection
        finally:
            connection.answering = None


class _Connection(H11Protocol):
    """uvicorn's connection, with limits on how many there are and how long a request may take."""

    def __init__(self, service: Service, **options: Any):
        super().__init__(**options)
        self.service = service
        self.arrived = 0.0
        self.answering: asyncio.Task[None] | None = None  # cancelled when the client leaves
        self.app_state = {"connection": self}
        self.refused = False
        self._timer: asyncio.TimerHandle | None = None  # runs until a request has arrived

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.service.settings.max_connections:
            self._refuse(busy(503, "too many connections", "too_many_connections"))
        else:
            self._begin_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)
        if self.answering is not None:
            self.answering.cancel()

    def data_received(self, data: bytes) -> None:
        """Reads on while a request is answered: otherwise nobody would see the client leave."""
        if self.refused:
            return
        if self._timer is None and not self._in_request:
            self._begin_timer()
        super().data_received(data)
        if self._in_request and not self.cycle.more_body:
            self._end_timer()
            self.flow.resume_reading()
            if len(self.conn.trailing_data[0]) > _MOST_PIPELINED:
                self.transport.abort()

    def on_response_complete(self) -> None:
        """Bounds the time for the rest of this request's body, or for that of the next."""
        self.arrived = self.loop.time()
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._begin_timer()

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection, also one whose client never read its last answer."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        self._refuse(ApiError(400, "the request is malformed"))

    @property
    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _begin_timer(self) -> None:
        self._end_timer()
        self.arrived = self.loop.time()
        error = ApiError(408, "the request took too long to arrive", code="timeout")
        seconds = self.service.settings.read_timeout
        self._timer = self.loop.call_later(seconds, self._refuse, error)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answers without the app, unless an answer has begun, and ends the connection."""
        self._end_timer()
        self._unset_keepalive_if_required()
        self.refused, cycle = True, self.cycle
        _note(error, "a connection")
        begun = cycle is not None and cycle.response_started
        if not begun or (cycle.response_complete and not cycle.more_body):
            body = json.dumps(error.as_json()).encode()
            headers = {"Content-Type": "application/json", "Content-Length": len(body)}
            headers |= error.headers | {"Connection": "close"}
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            self.service.metrics.requests.labels("other", str(error.status)).inc()
        # A client that still sends sees the answer only if what it sends is read.
        self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)


class Server(AbstractContextManager):
    """A running server; leaving its ``with`` block ends it without waiting for its requests.

    Args:
        settings: Its settings.

    Raises:
        KMergeError: The address, the key, the model or the adapter cannot be used.
    """

    def __init__(self, settings: ServeSettings):
        listener = _listen(settings.host, settings.port)  # it is known at once whether it is free
        try:
            self.service = Service(settings)
        except BaseException:
            listener.close()
            raise
        host, self.port = settings.host, listener.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        config = uvicorn.Config(
            make_app(self.service),
            http=partial(_Connection, self.service),
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            headers=[("Server", "kmerge-mlx")],
            timeout_keep_alive=settings.read_timeout,
            timeout_graceful_shutdown=2,
        )
        self._http = uvicorn.Server(config)
        connections = self._http.server_state.connections
        self.service.metrics.read("connections", "Open connections.", lambda: len(connections))
        self._thread = Thread(target=self._http.run, args=([listener],), name="http")
        self._thread.start()

    def close(self) -> None:
        """Ends it; requests in flight are given up."""
        self.service.close()
        self._http.should_exit = True
        self._thread.join()

    def __exit__(self, *error: object) -> None:
        self.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        reason = error.strerror or first_line(error)
        text = f"cannot listen on {host}:{port}: {reason}; choose another `host` or `port`"
        raise ServeError(text) from None
