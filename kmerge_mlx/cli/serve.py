"""``kmerge-mlx serve``."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kmerge_mlx.cli import options as opt
from kmerge_mlx.cli.opening import note_layout
from kmerge_mlx.cli.reading import json_object
from kmerge_mlx.serving.settings import (
    API_KEY_VARIABLE,
    LOG_LEVELS,
    SHORTEST,
    ServeConfig,
    read_api_key,
)

if TYPE_CHECKING:
    from kmerge_mlx.serving.run import Server

DEFAULTS = ServeConfig()
_LIMITS, _CACHES = "Limits", "Batching and caches"


def _limit(name: str, help: str, panel: str = _LIMITS, **range_: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel, show_default=True, **range_)


Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[
    int, typer.Option("--port", min=0, max=65_535, help="Port to listen on; 0 takes a free one.")
]
Seconds = Annotated[float, typer.Option(min=0.0)]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="FILE",
        help=f"File with the key that clients must show. Default: what {API_KEY_VARIABLE} holds.",
        show_default=False,
    ),
]
AllowedOrigins = Annotated[
    str | None,
    typer.Option(
        "--allowed-origins",
        help="Web origins whose pages may call the server, with commas; * is any. Default: none.",
        show_default=False,
    ),
]
ChatTemplateArgs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-args",
        help="Further chat template arguments, a JSON object.",
        show_default=False,
    ),
]
PromptCacheBytes = Annotated[
    str | None,
    _limit("--prompt-cache-bytes", "Most memory of the kept KV caches: 500M, 4GB.", _CACHES),
]
LogLevel = Annotated[
    str, typer.Option("--log-level", metavar="|".join(LOG_LEVELS), help="What is logged.")
]


def serve(
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    k: opt.MergeFactor = None,
    host: Host = DEFAULTS.host,
    port: Port = DEFAULTS.port,
    api_key: ApiKey = None,
    allowed_origins: AllowedOrigins = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Most tokens of an answer.")
    ] = DEFAULTS.max_tokens,
    temp: opt.Temp = DEFAULTS.temp,
    top_p: opt.TopP = DEFAULTS.top_p,
    min_p: opt.MinP = DEFAULTS.min_p,
    top_k: opt.TopK = DEFAULTS.top_k,
    merges: opt.Merges = None,
    merge_threshold: opt.MergeThreshold = None,
    chat_template: opt.UseChatTemplate = None,
    chat_template_args: ChatTemplateArgs = None,
    decode_concurrency: Annotated[
        int, _limit("--decode-concurrency", "Answers generated at once.", _CACHES, min=1)
    ] = DEFAULTS.decode_concurrency,
    prompt_concurrency: Annotated[
        int, _limit("--prompt-concurrency", "Prompts prefilled at once.", _CACHES, min=1)
    ] = DEFAULTS.prompt_concurrency,
    prefill_step_size: opt.PrefillStepSize = DEFAULTS.prefill_step_size,
    prompt_cache_size: Annotated[
        int, _limit("--prompt-cache-size", "KV caches kept for prefixes.", _CACHES, min=1)
    ] = DEFAULTS.prompt_cache_size,
    prompt_cache_bytes: PromptCacheBytes = None,
    kv_bits: opt.KvBits = None,
    kv_group_size: opt.KvGroupSize = DEFAULTS.kv_group_size,
    quantized_kv_start: opt.QuantizedKvStart = DEFAULTS.quantized_kv_start,
    max_body_bytes: Annotated[
        int, _limit("--max-body-bytes", "Largest request body.", min=1)
    ] = DEFAULTS.max_body_bytes,
    max_prompt_tokens: Annotated[
        int | None,
        _limit("--max-prompt-tokens", "Longest prompt. Default: what the context holds.", min=1),
    ] = None,
    max_queue: Annotated[
        int, _limit("--max-queue", "Requests that may wait; more get 429.", min=0)
    ] = DEFAULTS.max_queue,
    request_timeout: Annotated[
        float,
        _limit("--request-timeout", "Seconds for an answer, waiting included.", min=SHORTEST),
    ] = DEFAULTS.request_timeout,
    read_timeout: Annotated[
        float, _limit("--read-timeout", "Seconds for a request to arrive.", min=SHORTEST)
    ] = DEFAULTS.read_timeout,
    max_connections: Annotated[
        int, _limit("--max-connections", "Connections open at once.", min=1)
    ] = DEFAULTS.max_connections,
    drain_timeout: Annotated[
        float, _limit("--drain-timeout", "Seconds to end in, after SIGTERM.", min=0)
    ] = DEFAULTS.drain_timeout,
    max_blocks: Annotated[
        int, _limit("--max-blocks", "Distinct blocks in use at once.", min=1)
    ] = DEFAULTS.max_blocks,
    trust_remote_code: opt.TrustRemoteCode = False,
    log_level: LogLevel = DEFAULTS.log_level,
) -> None:
    """Serve an OpenAI-compatible API over merged prompts.

    mlx-lm's server with one pinned model: /v1/chat/completions, /v1/completions, /v1/models,
    /health and /metrics. Tags <merge> and <raw> in a text, or "merge" beside a message's content,
    say what merges. Ctrl-C or SIGTERM lets the requests that are in end first.

    \b
    Examples:
      kmerge-mlx serve
      kmerge-mlx serve --model M --adapter-path A --k 4 --port 8000
      kmerge-mlx serve --model M --adapter-path A --host 0.0.0.0 --api-key key.txt
    """
    given = dict(locals())
    named = given.pop("model"), given.pop("adapter_path")
    trusted, factor = given.pop("trust_remote_code"), given.pop("k")
    given |= {
        "api_key": read_api_key(api_key),
        "allowed_origins": tuple(filter(None, (allowed_origins or "").split(","))),
        "chat_template_args": json_object(chat_template_args, "--chat-template-args"),
        "prompt_cache_bytes": _bytes(prompt_cache_bytes),
        "merges": merges and str(merges),
        "log_level": log_level.upper(),
    }
    config = ServeConfig(**given)
    base, adapter = opt.chosen(*named)

    # The heavy imports wait until the settings are known to be good.
    from kmerge_mlx.serving.run import serve as run

    logging.basicConfig(level=config.log_level, format="%(asctime)s - %(levelname)s - %(message)s")
    model_and_adapter = (base, adapter, factor, trusted)
    run(config, *model_and_adapter, started=_say_where, draining=_say_end)


def _bytes(text: str | None) -> int | None:
    """A size such as 500M or 4GB, as mlx-lm reads it."""
    if text is None:
        return None
    number = text.strip().upper().removesuffix("B")
    units = {"K": 1e3, "M": 1e6, "G": 1e9}
    unit = units.get(number[-1:], 1)
    try:
        size = float(number.rstrip("KMG")) * unit
        return int(size)
    except (ValueError, OverflowError):
        hint = "--prompt-cache-bytes"
        raise typer.BadParameter(f"{text} is no size such as 4GB", param_hint=hint) from None


def _say_where(server: Server) -> None:
    provider, config = server.service.provider, server.service.config
    note_layout(provider.stored_layout, provider.layout, provider.tokenizer.has_chat_template)
    if not config.is_loopback and config.api_key is None:
        print(
            f"warning: {config.host} can be reached from other machines, and no --api-key is set: "
            "whoever reaches it can use the model",
            file=sys.stderr,
        )
    k, layout = provider.merge_factor, provider.layout
    merged = f"K={k}, merges {layout.merges}" if k > 1 else "nothing is merged"
    if k > 1 and layout.merges != "all":
        merged += f" of at least {layout.threshold} tokens"
    print(f"Serving {provider.name} ({merged}) at {server.url}/v1", file=sys.stderr, flush=True)


def _say_end() -> None:
    print("Ending: requests in flight end first (again: at once)", file=sys.stderr, flush=True)
