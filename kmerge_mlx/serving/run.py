"""Starting a server, and ending it: by its owner, or by a signal.

Owns: the order of things. Nobody is listened to before the model is loaded; when a signal comes,
nobody new is answered, those who wait get their answers, and then the threads end one by one.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from kmerge_mlx.serving.app import Handler
from kmerge_mlx.serving.http import BoundedServer
from kmerge_mlx.serving.model import PinnedModel
from kmerge_mlx.serving.service import Service
from kmerge_mlx.serving.settings import ServeConfig

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server:
    """A running server; leaving its ``with`` block ends it without waiting for anybody.

    Args:
        config: Its settings.
        base: Base model, as for :func:`kmerge_mlx.load`.
        adapter_path: Adapter folder, or None.
        k: Merge factor, or None for the adapter's only one.
        trust_remote_code: Let the base's own Python files run.

    Raises:
        KMergeError: The address, the model or the adapter cannot be had.
    """

    def __init__(
        self,
        config: ServeConfig,
        base: str,
        adapter_path: str | None = None,
        k: int | None = None,
        trust_remote_code: bool = False,
    ):
        # The address first: it is known at once whether it can be had.
        self._http = BoundedServer(config, self._handle, self._opened)
        try:
            provider = PinnedModel(config, base, adapter_path, k, trust_remote_code)
            self.service = Service(config, provider)
        except BaseException:
            self._http.server_close()
            raise
        try:
            self._http.listen()
        except BaseException:
            self.service.close()
            raise
        self._thread = Thread(target=self._http.serve_forever, args=(0.1,), name="http")
        self._thread.start()

    def _handle(self, *arguments: Any) -> Handler:
        return Handler(self.service, *arguments)

    def _opened(self, change: int) -> None:
        self.service.metrics.add("connections", change)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._http.server_port

    @property
    def url(self) -> str:
        """Where it is."""
        host = self._http.server_name
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def close(self) -> None:
        """Ends it; requests in flight are given up."""
        self.service.close()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(
    config: ServeConfig,
    *model: Any,
    started: Callable[[Server], None],
    draining: Callable[[], None],
) -> None:
    """Serves until SIGINT or SIGTERM, then drains; a second signal ends it at once.

    Args:
        config: The settings.
        model: See :class:`Server`.
        started: Called when requests are taken.
        draining: Called when the signal has come.

    Raises:
        KMergeError: The server cannot start.
    """
    with _signals() as (stop, at_once), Server(config, *model) as server:
        started(server)
        # A signal may reach another thread: this one must wake up by itself to see it.
        while not stop.wait(0.1):
            pass
        draining()
        drain = Thread(target=server.service.drain, daemon=True)
        drain.start()
        while drain.is_alive() and not at_once.wait(0.1):
            pass


@contextlib.contextmanager
def _signals() -> Iterator[tuple[Event, Event]]:
    """Turns the first signal and the second into events."""
    first, second = Event(), Event()

    def note(number: int, frame: Any) -> None:
        (second if first.is_set() else first).set()

    kept = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield first, second
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
