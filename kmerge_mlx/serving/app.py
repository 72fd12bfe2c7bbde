"""The HTTP server: routes, hosts, keys and origins, and how it starts and ends."""

from __future__ import annotations

import asyncio
import hmac
import re
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from ipaddress import ip_address
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

from kmerge_mlx.errors import KMergeError, ServeError, first_line
from kmerge_mlx.serving.answers import ApiError, ClientGone, as_api_error, body_too_large, event
from kmerge_mlx.serving.connection import MOST_HEAD_BYTES, Connection, note_refusal
from kmerge_mlx.serving.generator import PinnedModel
from kmerge_mlx.serving.page import HEADERS, PAGE
from kmerge_mlx.serving.requests import unknown_model
from kmerge_mlx.serving.service import Service
from kmerge_mlx.serving.settings import ServeSettings

_LEFT = 499  # nginx's status for a client that left; only the metrics show it
_JSON = [(b"content-type", b"application/json")]
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
        return _models(service.provider, wanted, started)

    @post("/v1/completions")
    @post("/v1/chat/completions")
    @post("/chat/completions")
    async def complete(request: Request) -> Response:
        chat = request.scope["path"].endswith("/chat/completions")
        _check_body(request, service.settings)
        return _Answering(request, partial(service.answer, chat=chat), service.settings, _STREAM)

    @post("/v1/layout")
    async def layout(request: Request) -> Response:
        _check_body(request, service.settings)
        return _Answering(request, service.lay_out, service.settings, _JSON)

    @get("/")
    async def page() -> Response:
        return Response(PAGE, headers=HEADERS, media_type="text/html")

    return _counted(app, service)


def _counted(app: FastAPI, service: Service) -> ASGIApp:
    """An app that answers who calls it by one of its names, and counts every request."""

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        scope["path"] = _without_slashes(scope["path"])
        status, request = _LEFT, Request(scope)

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            ours = _is_ours(request.headers.get("Host", ""), service.settings)
            answer = app if ours else await _as_response(request, _foreign_host())
            await answer(scope, receive, noting)
        finally:
            if not request.state.connection.refused:  # that was counted
                seen = _LEFT if scope["state"].get("left") else status
                service.metrics.requests.labels(_route_of(scope), str(seen)).inc()

    return counting


def _models(provider: PinnedModel, wanted: str, created: int) -> Response:
    """The names that are served, or one of them."""
    about = {"object": "model", "created": created, "owned_by": "kmerge-mlx"}
    known = {name: {"id": name} | about for name in provider.ks}
    if not wanted:
        return JSONResponse({"object": "list", "data": [*known.values()]})
    if wanted not in provider.names:
        raise unknown_model(wanted, provider.names)
    return JSONResponse(known[provider.names[wanted]])


def _route_of(scope: Scope) -> str:
    """The route that FastAPI found: what a client made up is not a label."""
    return getattr(scope.get("route"), "path", "other").split("/{")[0]


def _without_slashes(path: str) -> str:
    """A path without slashes too many: clients extend an address that may end in one."""
    return "/" + "/".join(filter(None, path.split("/")))


async def _as_response(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_LEFT)
    if isinstance(error, HTTPException):
        asked, headers = repr(request.scope["path"][:60]), error.headers
        error = ApiError(404, f"there is no {asked} here", code="not_found")
        if headers:
            message = f"{asked} takes {headers['Allow']}, not {request.method}"
            if request.method == "OPTIONS" and "Origin" in request.headers:
                message += ": to let a web page of this origin call, see --allowed-origins"
            error = ApiError(405, message, code="method_not_allowed", headers=dict(headers))
    answer = as_api_error(error)
    note_refusal(answer, f"{request.method} {request.scope['path']}")
    if request.state.connection.cycle.waiting_for_100_continue:
        # A client that has its answer may or may not send the body that it announced.
        answer.headers = answer.headers | {"Connection": "close"}
    return JSONResponse(answer.as_json(), answer.status, answer.headers)


def _foreign_host() -> ApiError:
    message = "this server does not go by the Host of the request: see --allowed-hosts"
    return ApiError(403, message, code="host_not_allowed")


def _is_ours(host: str, settings: ServeSettings) -> bool:
    """Whether a request's Host is an address, or a name of this server.

    A web page may let its own name stand for this machine (DNS rebinding), but no address.
    """
    # Without one it is HTTP/1.0, and no browser.
    return not host or "*" in settings.allowed_hosts or _is_named(host, settings)


def _is_named(host: str, settings: ServeSettings) -> bool:
    """Whether a Host is an address, or a name that is known to be this server's."""
    name = re.sub(r":\d*$", "", host).removeprefix("[").removesuffix("]").lower()
    machine = socket.gethostname()
    own = ["localhost", settings.host, machine, machine.partition(".")[0] + ".local"]
    if name in map(str.lower, [*own, *settings.allowed_hosts]):
        return True
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def _is_own_page(origin: str, request: Request, settings: ServeSettings) -> bool:
    """Whether a request comes from the server's own page, by a name that is known to be its own."""
    host = request.headers.get("Host", "")
    return bool(host) and origin.partition("://")[2] == host and _is_named(host, settings)


async def _check_client(service: Service, request: Request) -> None:
    """A page in a browser names its origin; other clients send a key."""
    origin, allowed = request.headers.get("Origin"), service.settings.allowed_origins
    own = origin is not None and _is_own_page(origin, request, service.settings)
    if not (origin is None or own or origin in allowed or "*" in allowed):
        message = "this origin may not call the server: see --allowed-origins"
        raise ApiError(403, message, code="origin_not_allowed")
    if service.key is None or request.scope["path"] in ("/", "/health"):
        return
    kind, _, given = request.headers.get("Authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), service.key.encode())
    if kind.lower() != "bearer" or not same:
        headers = {"WWW-Authenticate": "Bearer"}
        message = "the API key is missing or wrong"
        raise ApiError(401, message, code="invalid_api_key", headers=headers)


def _check_body(request: Request, settings: ServeSettings) -> None:
    """What a request's headers say of its body; Service.answer reads it."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body must not be compressed")
    if int(request.headers.get("Content-Length", 0)) > settings.max_body_bytes:
        raise body_too_large(settings.max_body_bytes)


class _Answering(Response):
    """Answers one request; unlike FastAPI's responses it sees the client leave at any moment.

    Args:
        request: The request.
        answer: Makes the answer, as :meth:`Service.answer` does.
        settings: The server's.
        headers: Those of what is written piece by piece.
    """

    def __init__(
        self,
        request: Request,
        answer: Callable[..., Awaitable[dict[str, Any] | None]],
        settings: ServeSettings,
        headers: list[tuple[bytes, bytes]],
    ):
        super().__init__()
        self.request, self.answer, self.settings = request, answer, settings
        self.begun_with = {"type": "http.response.start", "status": 200, "headers": headers}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection, begun, lock = scope["state"]["connection"], False, asyncio.Lock()

        async def put(message: Message) -> None:
            try:
                async with asyncio.timeout(self.settings.read_timeout):
                    await send(message)
            except TimeoutError:
                raise ClientGone("the client does not read") from None

        async def write(text: str, last: bool = False) -> None:
            nonlocal begun
            body = {"type": "http.response.body", "body": text.encode(), "more_body": not last}
            async with lock:  # a request may have several prompts
                if not begun:
                    await put(self.begun_with)
                    begun = True
                await put(body)

        connection.answering = asyncio.current_task()
        try:
            try:
                asked = {"pieces": self.request.stream(), "arrived": connection.arrived}
                whole = await self.answer(**asked, write=write)
                await (write("", last=True) if begun else JSONResponse(whole)(scope, receive, put))
            except (ApiError, KMergeError) as error:
                if not begun:
                    raise
                answer = as_api_error(error)
                note_refusal(answer, "a stream")
                await write(event(answer.as_json()), last=True)
        except (ClientGone, asyncio.CancelledError):
            connection.answering, scope["state"]["left"] = None, True
            connection.transport.abort()
            await asyncio.sleep(0)  # uvicorn sees the end of the connection
        finally:
            connection.answering = None


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
            http=partial(Connection, self.service),
            h11_max_incomplete_event_size=MOST_HEAD_BYTES,
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
        self._http.should_exit = True
        self.service.close()
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
