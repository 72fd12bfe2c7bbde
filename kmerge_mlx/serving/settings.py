"""The settings of ``kmerge-mlx serve``.

Source: ``mlx_lm.server`` for names and defaults (a test compares them).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge_mlx.config import MAX_BLOCKS
from kmerge_mlx.errors import ServeError
from kmerge_mlx.settings import (
    SIZE,
    CacheSettings,
    LayoutSettings,
    ModelSettings,
    SamplingSettings,
    option,
    parse_size,
)

API_KEY_VARIABLE = "KMERGE_MLX_API_KEY"
MOST_KEY = 4096  # characters
FOLDER_BYTES = "20GB"

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_LIMIT = {"low": 1, "group": "Limits"}
_TIME, _FROM_0 = _LIMIT | {"low": 1e-3}, _LIMIT | {"low": 0}
_CACHE = {"group": "Batching and caches"}
_BATCH = {"low": 1} | _CACHE


@dataclass(frozen=True)
class ServeSettings(SamplingSettings, LayoutSettings, ModelSettings):
    """The settings of a server; each field's option says what it means.

    Raises:
        SettingsError: Settings of the wrong type or out of range, all of them listed.
    """

    NAME = "serve"

    host: str = option("127.0.0.1", str, "Address to listen on.")
    port: int = option(8080, int, "Port to listen on; 0 takes a free one.", low=0, high=65_535)
    api_key: str | None = option(
        None, str, f"File with the key that clients must send. Default: {API_KEY_VARIABLE}'s value."
    )
    allowed_origins: Any = option(
        (), list, "Web origins whose pages may call, with commas; * is any. Default: none."
    )
    allowed_hosts: Any = option(
        (), list, "Further host names that clients may call it by, with commas; * is any."
    )
    max_tokens: int = option(
        512, int, "Most tokens of an answer.", low=1, flags=("--max-tokens", "-m")
    )
    chat_template_args: Any = option({}, dict, "Further chat template arguments, a JSON object.")
    expand: bool = option(False, bool, "Let the model ask for the exact text of what was merged.")
    decode_concurrency: int = option(32, int, "Answers generated at once.", **_BATCH)
    prompt_concurrency: int = option(8, int, "Prompts prefilled at once.", **_BATCH)
    prefill_step_size: int = CacheSettings.setting("prefill_step_size", **_CACHE)
    prompt_cache_size: int = option(10, int, "KV caches kept for prefixes.", **_BATCH)
    prompt_cache_bytes: Any = option(None, SIZE, "Most memory of those: 500M, 4GB.", **_CACHE)
    prompt_cache_dir: str | None = option(
        None, str, "Folder that keeps KV caches of prefixes, to be found after a restart.", **_CACHE
    )
    prompt_cache_dir_bytes: Any = option(
        None,
        SIZE,
        "Most bytes of it; what was used longest ago goes.",
        shown=FOLDER_BYTES,
        **_CACHE,
    )
    kv_bits: int | None = CacheSettings.setting("kv_bits", **_CACHE)
    kv_group_size: int = CacheSettings.setting("kv_group_size", **_CACHE)
    quantized_kv_start: int = CacheSettings.setting("quantized_kv_start", **_CACHE)
    max_body_bytes: int = option(8 * 2**20, int, "Largest request body.", **_LIMIT)
    max_prompt_tokens: int | None = option(
        None, int, "Longest prompt. Default: what the context holds.", **_LIMIT
    )
    max_queue: int = option(64, int, "Requests that may wait; more get 429.", **_FROM_0)
    request_timeout: float = option(600.0, float, "Seconds for an answer, with waiting.", **_TIME)
    read_timeout: float = option(30.0, float, "Seconds for a request to arrive.", **_TIME)
    max_connections: int = option(256, int, "Connections open at once.", **_LIMIT)
    drain_timeout: float = option(30.0, float, "Seconds to end in, after SIGTERM.", **_FROM_0)
    max_blocks: int = option(MAX_BLOCKS, int, "Distinct blocks in use at once.", **_LIMIT)
    log_level: str = option("INFO", str, "What is logged.", choices=_LEVELS)

    def clashes(self) -> list[str]:
        if self.prompt_cache_dir is None and self.prompt_cache_dir_bytes is not None:
            return ["`prompt_cache_dir_bytes` needs a `prompt_cache_dir`"]
        if self.prompt_cache_dir == "":
            return ["`prompt_cache_dir` is empty, expected a folder"]
        if not self.folder_limit:
            return ["`prompt_cache_dir_bytes` is 0, expected room for prefixes, such as 20GB"]
        return []

    @property
    def cache_limit(self) -> int | None:
        """Most bytes of KV caches that are kept for prefixes."""
        return _bytes(self.prompt_cache_bytes)

    @property
    def folder_limit(self) -> int:
        """Most bytes of the files in ``prompt_cache_dir``."""
        given = self.prompt_cache_dir_bytes
        return _bytes(FOLDER_BYTES if given is None else given)


def _bytes(size: Any) -> int | None:
    return parse_size(size) if isinstance(size, str) else size


def read_api_key(file: str | None) -> str | None:
    """The key that clients must send, from a file or else from the environment."""
    key, source = os.environ.get(API_KEY_VARIABLE), API_KEY_VARIABLE
    if file is not None:
        source = f"`api_key` {file}"
        try:
            with Path(file).open(encoding="utf-8") as opened:
                key = opened.read(MOST_KEY + 1)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ServeError(f"cannot read {source}: {reason}") from None
    if key is None:
        return None
    long, key = len(key) > MOST_KEY, key.strip()
    if long or not (key and key.isascii() and key.isprintable()):
        raise ServeError(
            f"{source} is empty, over {MOST_KEY:,} characters long, or has characters that an HTTP "
            "header cannot hold"
        )
    return key
