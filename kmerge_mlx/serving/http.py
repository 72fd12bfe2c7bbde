"""Sockets: how many, for how long, and when nobody is at the other end.

Owns: the bounded threading server, the deadline for reading a request, and the look at whether a
client is still there. Does not know what requests say.
"""

from __future__ import annotations

import io
import logging
import select
import socket
import socketserver
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from threading import BoundedSemaphore
from typing import Any

from kmerge_mlx.errors import ServeError, first_line
from kmerge_mlx.serving.answers import ApiError
from kmerge_mlx.serving.settings import ServeConfig

_log = logging.getLogger(__name__)
_FULL = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b'Connection: close\r\n\r\n{"error": {"message": "too many connections", '
    b'"type": "server_error", "param": null, "code": "too_many_connections"}}'
)


class DeadlineReader(io.RawIOBase):
    """A socket to read from until a deadline, however slowly its bytes drip in.

    Args:
        connection: The socket.
        seconds: Until the deadline.
    """

    def __init__(self, connection: socket.socket, seconds: float):
        super().__init__()
        self._connection = connection
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what is there.

        Raises:
            ApiError: 408: the deadline has passed.
        """
        left = self._deadline - time.monotonic()
        try:
            self._connection.settimeout(max(left, 1e-3))
            return self._connection.recv_into(buffer)
        except TimeoutError:
            raise ApiError(408, "the request took too long to arrive", code="timeout") from None


def is_gone(connection: socket.socket) -> bool:
    """Whether a client has closed its end. What it still sends is thrown away."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    try:
        # The end of what was sent shows once all before it is read.
        while poll.poll(0):
            if not connection.recv(1 << 16):
                return True
    except OSError:
        return True
    return False


class BoundedServer(ThreadingHTTPServer):
    """A threading HTTP server with a bound on its connections. Not listening until told to.

    Args:
        config: The server's settings.
        handler: Called with (socket, address, server) for each connection.
        opened: Called with 1 or -1 when a connection begins or ends.

    Raises:
        ServeError: The address is not this machine's, or is in use.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, config: ServeConfig, handler: Any, opened: Callable[[int], None]):
        self._opened = opened
        self._free = BoundedSemaphore(config.max_connections)
        where = (config.host, config.port)
        try:
            passive = socket.AI_PASSIVE
            found = socket.getaddrinfo(*where, type=socket.SOCK_STREAM, flags=passive)
            self.address_family, _, _, _, address = found[0]
            super().__init__(address, handler, bind_and_activate=False)
            self.server_bind()
        except OSError as error:
            raise _cannot_listen(where, error) from None
        self._where = where

    def server_bind(self) -> None:
        """Binds, without asking a name server who this machine is."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def listen(self) -> None:
        """Begins to take connections.

        Raises:
            ServeError: Somebody else does, on this port.
        """
        try:
            self.server_activate()
        except OSError as error:
            self.server_close()
            raise _cannot_listen(self._where, error) from None

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread of its own, or refuses where there are too many."""
        if not self._free.acquire(blocking=False):
            request.settimeout(0.1)
            try:
                request.sendall(_FULL)
            except OSError:
                _log.debug("a client left before it was refused")
            self.shutdown_request(request)
            return
        self._opened(1)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._opened(-1)
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs what no handler caught."""
        _log.exception("answering %s failed", client_address)


def _cannot_listen(where: tuple[str, int], error: OSError) -> ServeError:
    host, port = where
    reason = error.strerror or first_line(error)
    return ServeError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port")
