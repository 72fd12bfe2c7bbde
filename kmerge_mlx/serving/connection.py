"""A client's connection: how many there are, how long a head may be, how long a request may take.

All of this holds before anything of a request is parsed, and before a key is known.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from kmerge_mlx.serving.answers import ApiError, busy
from kmerge_mlx.serving.service import Service

MOST_HEAD_BYTES = 2**15
MOST_HEADERS = 100
"""Of one request. Python takes 30 microseconds for each, before any key is known."""

_log = logging.getLogger(__name__)

_HEAD_END = re.compile(rb"\n\r?\n")  # as h11 finds it
_PIECE = 2**14  # h11 looks at its own limit (of a chunked body's trailers) only between pieces
_MOST_PIPELINED = 2**16
_LAST_ANSWER_SECONDS = 1.0


def note_refusal(error: ApiError, asked: str) -> None:
    """Logs why a request was refused, in printable letters."""
    _log.info("%r got %d: %r", asked[:80], error.status, str(error))


class Connection(H11Protocol):
    """uvicorn's connection with limits.

    Args:
        service: Its settings are the limits.
        options: uvicorn's own arguments.
    """

    def __init__(self, service: Service, **options: Any):
        super().__init__(**options)
        self.service, self._seconds = service, service.settings.read_timeout
        self.arrived = 0.0  # or since when it waits for a request, or is refused
        self.answering: asyncio.Task[None] | None = None  # cancelled when the client leaves
        self.app_state = {"connection": self}
        self.refused = False
        # Runs until a request has arrived, or the client of a refused one has left.
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._begin_timer()
        self._make_room()

    def _make_room(self) -> None:
        """Ends a connection where there are too many: the one that waited longest, or this one.

        A refused one stays until its client has seen the answer, unless as many others do.
        """
        most = self.service.settings.max_connections
        open_ = [c for c in self.connections if not c.transport.is_closing()]
        refused = [c for c in open_ if c.refused]
        if len(refused) > most:
            min(refused, key=lambda c: c.arrived).transport.abort()
        if len(open_) - len(refused) <= most:
            return
        waiting = [c for c in open_ if not c.refused and c is not self and not c.has_arrived]
        chosen = min(waiting, key=lambda c: (c._in_request, c.arrived), default=self)
        if chosen._timer is None:  # between requests
            chosen.timeout_keep_alive_handler()
        else:
            chosen._refuse(busy(503, "too many connections", "too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)
        if self.answering is not None:
            self.answering.cancel()

    def data_received(self, data: bytes) -> None:
        """Reads on while a request is answered: otherwise nobody would see the client leave."""
        if self._timer is None and not self._in_request and not self.refused:
            self._begin_timer()
        for start in range(0, len(data), _PIECE):
            if not self.refused:
                super().data_received(data[start : start + _PIECE])
        if self.has_arrived and not self.refused:
            self._end_timer()
            self.flow.resume_reading()
            if len(self.conn.trailing_data[0]) > _MOST_PIPELINED:
                self.transport.abort()

    def handle_events(self) -> None:
        """Parses what came, unless it is the head of a request and too long."""
        if self.conn.their_state is h11.IDLE:
            found = self.conn.trailing_data[0][: MOST_HEAD_BYTES + 1]
            end = _HEAD_END.search(found)
            head = found[: end.end()] if end else found
            if len(head) > MOST_HEAD_BYTES or head.count(b"\n") > MOST_HEADERS + 2:
                most = f"{MOST_HEADERS} headers and {MOST_HEAD_BYTES:,} bytes"
                message = f"the request's headers are more than the {most} that the server takes"
                self._refuse(ApiError(431, message, code="headers_too_large"))
                return
        super().handle_events()

    def on_response_complete(self) -> None:
        """Bounds the time for the rest of this request's body, or for that of the next."""
        self.arrived = self.loop.time()
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._begin_timer()

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection, also one whose client never read its last answer."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(_LAST_ANSWER_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        self._refuse(ApiError(400, "the request is malformed"))

    def shutdown(self) -> None:
        """Ends the connection with the server, once its request is answered."""
        if self.refused:
            self.transport.abort()
        else:
            super().shutdown()

    @property
    def has_arrived(self) -> bool:
        """Whether all of a request is here, and its answer is not complete."""
        return self._in_request and not self.cycle.more_body

    @property
    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _begin_timer(self) -> None:
        self._end_timer()
        self.arrived = self.loop.time()
        error = ApiError(408, "the request took too long to arrive", code="timeout")
        self._timer = self.loop.call_later(self._seconds, self._refuse, error)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answers without the app, unless an answer has begun, and ends the connection."""
        self._end_timer()
        self._unset_keepalive_if_required()
        self.refused, self.arrived, cycle = True, self.loop.time(), self.cycle
        note_refusal(error, "a connection")
        begun = cycle is not None and cycle.response_started
        if not begun or (cycle.response_complete and not cycle.more_body):
            body = json.dumps(error.as_json()).encode()
            headers = {"Content-Type": "application/json", "Content-Length": len(body)}
            headers |= error.headers | {"Connection": "close"}
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            self.service.metrics.requests.labels("other", str(error.status)).inc()
        if self._in_request:  # the app waits for the rest of the body
            cycle.disconnected = True
            cycle.message_event.set()
        # A client that still sends sees the answer only if what it sends is read: a connection that
        # is closed before is reset, and its answer lost with it.
        self.transport.write_eof()
        self.transport.resume_reading()
        self._timer = self.loop.call_later(self._seconds, self.transport.abort)
