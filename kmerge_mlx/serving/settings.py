"""Every setting of the server, and the only place that holds its defaults.

Owns: defaults and what is refused. Knows no arrays and no sockets: ``--help`` imports it.

Source: ``mlx_lm.server`` for names and defaults (a test compares them).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kmerge_mlx.config import MAX_BLOCKS, is_int, is_number
from kmerge_mlx.errors import ServeError, findings, short
from kmerge_mlx.prompts.policy import MERGES

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
API_KEY_VARIABLE = "KMERGE_MLX_API_KEY"
SHORTEST = 1e-3
"""Seconds that a timeout has at least."""

_KV_BITS = (2, 3, 4, 5, 6, 8)
_KV_GROUPS = (32, 64, 128)


def _number(default: float, low: float = 0.0, high: float | None = None) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


def _whole(default: int | None, low: int = 1, high: int | None = None) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "whole": True})


@dataclass(frozen=True)
class ServeConfig:
    """What ``kmerge-mlx serve`` can be told. Sizes are bytes, times seconds.

    Args:
        host: Address to listen on.
        port: Port; 0 lets the system choose.
        temp: Sampling temperature of a request that names none; so the others.
        max_tokens: Most tokens of an answer whose request names no limit.
        decode_concurrency: Answers generated at once.
        prompt_concurrency: Prompts prefilled at once.
        prefill_step_size: Positions prefilled at once.
        prompt_cache_size: KV caches kept for prefixes.
        prompt_cache_bytes: Most memory of those, or None for no limit.
        kv_bits: Quantizes KV caches; requests are then served one at a time.
        chat_template_args: Further arguments of the chat template.
        merges: What merges where nothing is said; None is as the adapter was trained. So
            ``merge_threshold`` and ``chat_template``.
        max_body_bytes: Largest request body.
        max_prompt_tokens: Longest prompt, in original tokens; None leaves it to the context.
        max_queue: Requests that may wait beside those that run.
        request_timeout: From a request's arrival to the end of its answer.
        read_timeout: For a request's headers and body, all in all.
        max_connections: Sockets open at once.
        drain_timeout: How long requests in flight may take to end after SIGTERM.
        max_blocks: Slots of the block table.
        api_key: What clients must show, or None.
        allowed_origins: Web origins whose pages may call the server; ``*`` is any.
        log_level: Of the standard ``logging``.

    Raises:
        ServeError: Every value that cannot be, listed.
    """

    host: str = "127.0.0.1"
    port: int = _whole(8080, 0, 65_535)
    temp: float = _number(0.0)
    top_p: float = _number(1.0, high=1.0)
    top_k: int = _whole(0, 0)
    min_p: float = _number(0.0, high=1.0)
    max_tokens: int = _whole(512)
    decode_concurrency: int = _whole(32)
    prompt_concurrency: int = _whole(8)
    prefill_step_size: int = _whole(2048)
    prompt_cache_size: int = _whole(10)
    prompt_cache_bytes: int | None = _whole(None)
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = _whole(5000, 0)
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    merges: str | None = None
    merge_threshold: int | None = _whole(None)
    chat_template: bool | None = None
    max_body_bytes: int = _whole(8 * 2**20)
    max_prompt_tokens: int | None = _whole(None)
    max_queue: int = _whole(64, 0)
    request_timeout: float = _number(600.0, SHORTEST)
    read_timeout: float = _number(30.0, SHORTEST)
    max_connections: int = _whole(256)
    drain_timeout: float = _number(30.0)
    max_blocks: int = _whole(MAX_BLOCKS)
    api_key: str | None = field(default=None, repr=False)
    allowed_origins: tuple[str, ...] = ()
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        problems = [p for f in fields(self) if f.metadata for p in self._range_problem(f)]
        choices = {"kv_bits": (None, *_KV_BITS), "kv_group_size": _KV_GROUPS}
        choices |= {"merges": (None, *MERGES), "log_level": LOG_LEVELS}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                named = ", ".join(str(k) for k in known if k is not None)
                problems.append(f"{name} is {short(value)}, expected one of {named}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            problems.append("api_key has characters that no HTTP header can hold")
        elif self.api_key is not None and not self.api_key.strip():
            problems.append("api_key is empty: leave it out, or put a key in it")
        if problems:
            raise ServeError(findings("cannot serve", problems))

    def _range_problem(self, setting: Any) -> list[str]:
        value, rule = getattr(self, setting.name), setting.metadata
        if value is None and setting.default is None:
            return []
        low, high = rule["low"], rule["high"]
        good = is_int(value, low) if rule.get("whole") else is_number(value) and value >= low
        if good and (high is None or value <= high):
            return []
        kind = "a whole number" if rule.get("whole") else "a number"
        most = "" if high is None else f" and at most {high}"
        return [f"{setting.name} is {short(value)}, expected {kind} of at least {low}{most}"]

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK or self.host.startswith("127.")


def read_api_key(file: str | None) -> str | None:
    """The key that clients must show, from a file or else the environment.

    Args:
        file: Name of a file that holds nothing else, or None.

    Raises:
        ServeError: The file cannot be read, or is empty.
    """
    if file is None:
        return os.environ.get(API_KEY_VARIABLE)
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ServeError(f"cannot read --api-key {file}: {reason}") from None
    if not key:
        raise ServeError(f"--api-key {file} is empty: put the key in it")
    return key
