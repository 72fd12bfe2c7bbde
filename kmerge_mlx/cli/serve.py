"""``kmerge-mlx serve``."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kmerge_mlx.cli.inputs import command
from kmerge_mlx.cli.output import note, note_layout, note_unnamed, on_signals
from kmerge_mlx.errors import ServeError
from kmerge_mlx.serving.settings import ServeSettings

if TYPE_CHECKING:
    from kmerge_mlx.serving.service import Service


_OTHER_FILES = 256  # open beside the connections, of which as many again may be ending


@command(ServeSettings, config_file=True)
def serve(settings: ServeSettings) -> None:
    """Serve an OpenAI-compatible API over merged prompts.

    mlx-lm's engine with one pinned model: /v1/chat/completions, /v1/completions, /v1/layout,
    /v1/models, /health and /metrics, and a page in which to ask it. Tags <merge> and <raw> in a
    text, or "merge" beside a message's content, decide what merges. Ctrl-C or SIGTERM lets the
    requests in flight end first.

    \b
    Examples:
      kmerge-mlx serve
      kmerge-mlx serve --model M --adapter-path A --k 4 --port 8000
      kmerge-mlx serve --model M --adapter-path A --host 0.0.0.0 --api-key key.txt
    """
    from kmerge_mlx.serving.app import Server

    form = "%(asctime)s - %(levelname)s - %(message)s"
    logging.basicConfig(level=settings.log_level, format=form)
    note_unnamed(settings.model, settings.adapter_path)
    _allow_open_files(2 * settings.max_connections + _OTHER_FILES)
    received: list[int] = []
    with _killable():
        server = Server(settings)
    with on_signals(received.append), server:
        _report_start(server.service, server.url)
        # A signal may reach another thread: this one must wake up by itself to see it.
        while not received:
            time.sleep(0.1)
            if server.service.health == "unavailable":
                raise ServeError("the model has stopped: its log says why")
        note("Ending: requests in flight end first (again: at once)")
        left = server.service.drain(settings.drain_timeout, lambda: len(received) > 1)
    if left:
        raise ServeError(f"{left} requests did not end in time and were given up")


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, which is 256 on macOS, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own beside hard
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def _killable() -> Iterator[None]:
    """Ctrl-C ends the process at once, as ``kill`` does: Python would wait for what is loading."""
    kept = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, kept)


def _report_start(service: Service, url: str) -> None:
    provider, host = service.provider, service.settings.host
    k, layout = provider.source.k, provider.layout
    note_layout(provider.stored_layout, layout, service.tokenizer.has_chat_template)
    is_local = host in ("::1", "localhost") or host.startswith("127.")
    if not is_local and service.key is None:
        note(
            f"warning: {host} can be reached from other machines, and no --api-key is set: whoever "
            "reaches it can use the model"
        )
    merged = f"K={k}, merges {layout.merges}" if k > 1 else "nothing is merged"
    if others := [name for name in provider.ks if name != provider.name]:
        merged = f"K={k}, or as {', '.join(others)}; merges {layout.merges}"
    if k > 1 and layout.merges != "all":
        merged += f" of at least {layout.threshold} tokens"
    if k > 1 and layout.keep:
        merged += f" but {', '.join(layout.keep)}"
    note(f"To ask it in a browser: {url}")
    note(f"Serving {provider.name} ({merged}) at {url}/v1")
