"""``kmerge-mlx serve``."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from kmerge_mlx.cli.inputs import command
from kmerge_mlx.serving.settings import ServeSettings

if TYPE_CHECKING:
    from kmerge_mlx.serving.app import Server


@command(ServeSettings, config_file=True)
def serve(settings: ServeSettings) -> None:
    """Serve an OpenAI-compatible API over merged prompts.

    mlx-lm's engine with one pinned model: /v1/chat/completions, /v1/completions, /v1/models,
    /health and /metrics. Tags <merge> and <raw> in a text, or "merge" beside a message's content,
    decide what merges. Ctrl-C or SIGTERM lets the requests in flight end first.

    \b
    Examples:
      kmerge-mlx serve
      kmerge-mlx serve --model M --adapter-path A --k 4 --port 8000
      kmerge-mlx serve --model M --adapter-path A --host 0.0.0.0 --api-key key.txt
    """
    from kmerge_mlx.serving.app import serve as run

    level = settings.log_level
    logging.basicConfig(level=level, format="%(asctime)s - %(levelname)s - %(message)s")
    run(settings, started=_report_start, draining=_report_end)


def _report_start(server: Server) -> None:
    from kmerge_mlx.cli.output import note_layout

    service = server.service
    provider, settings = service.provider, service.settings
    k, layout = provider.source.k, provider.layout
    has_template = service.tokenizer.has_chat_template
    note_layout(provider.stored_layout, layout, has_template)
    if not settings.is_loopback and service.key is None:
        print(
            f"warning: {settings.host} can be reached from other machines, and no --api-key is "
            "set: whoever reaches it can use the model",
            file=sys.stderr,
        )
    merged = f"K={k}, merges {layout.merges}" if k > 1 else "nothing is merged"
    if k > 1 and layout.merges != "all":
        merged += f" of at least {layout.threshold} tokens"
    print(f"Serving {provider.name} ({merged}) at {server.url}/v1", file=sys.stderr, flush=True)


def _report_end() -> None:
    print("Ending: requests in flight end first (again: at once)", file=sys.stderr, flush=True)
