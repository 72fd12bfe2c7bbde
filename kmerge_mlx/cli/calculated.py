"""What the calculator found, for people and as JSON; and how an amount of memory is written.

Owns the tables of ``kmerge-mlx info --model`` and what their words mean. The numbers are
``sizing.py``'s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from kmerge_mlx.cli.tables import aligned, size
from kmerge_mlx.config import MULTIPLICATIONS_PER_BYTE, USABLE_SHARE

if TYPE_CHECKING:
    from kmerge_mlx.tools.sizing import BaseSizes, Factor, Row, Sizing, SizingConfig

_MEMORY = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)\s*([MGT])i?B?", re.IGNORECASE)
_SHIFT = {"M": 20, "G": 30, "T": 40}


def parse_memory(text: str | None) -> int | None:
    """``16GB`` to bytes. Memory is sold in powers of two: ``GB`` and ``GiB`` are the same here.

    Raises:
        typer.BadParameter: Anything else.
    """
    if text is None:
        return None
    found = _MEMORY.fullmatch(text.strip())
    amount = int(float(found[1]) * (1 << _SHIFT[found[2].upper()])) if found else 0
    if not amount:
        raise typer.BadParameter(
            f"expected an amount as in 16GB, found {text!a}", param_hint="--memory"
        )
    return amount


def report_of(name: str, config: SizingConfig, memory: int | None, found: Sizing) -> dict[str, Any]:
    """Everything as plain data, with what was assumed."""
    assumed = {
        "multiplications_per_byte": MULTIPLICATIONS_PER_BYTE,
        "usable_share_of_memory": USABLE_SHARE,
    }
    settings = {"model": name, "memory_bytes": memory, **asdict(config)}
    return {"kind": "calculation", "settings": settings, "assumed": assumed, **asdict(found)}


def text_of(name: str, config: SizingConfig, memory: int | None, found: Sizing) -> str:
    """Everything as tables."""
    asked = memory is not None
    parts = [_title(name, found.base), "", _factors(found.factors, memory), ""]
    parts += [_rows(found.rows, asked), "", *_legend(found, config, asked)]
    return "\n".join(parts)


def _title(name: str, base: BaseSizes) -> str:
    context = f"{base.context_length:,} positions" if base.context_length else "unknown"
    source = "weights' headers" if base.has_weights else "config"
    return (
        f"{name}: {base.model_type}, {base.parameters:,} parameters, {size(base.weight_bytes)} "
        f"({base.dtype}, from its {source}); context {context}"
    )


def _factors(factors: Sequence[Factor], memory: int | None) -> str:
    head = ["K", "encoder", "its size"]
    longest = [] if memory is None else [f"longest prompt in {_binary(memory)}", "ends at"]
    lines = [[*head, *longest]]
    for factor in factors:
        parameters, taken = f"{factor.encoder_parameters:,}", size(factor.encoder_bytes)
        cells = [str(factor.k), *((parameters, taken) if factor.k > 1 else ("none", "-"))]
        if longest:
            known = factor.longest_prompt
            cells += ["no limit found" if known is None else f"{known:,} tokens"]
            cells += [factor.limited_by or "-"]
        lines.append(cells)
    return aligned(lines)


def _rows(rows: Sequence[Row], asked: bool) -> str:
    head = ["prompt", "K", "positions", "KV cache", "memory", *(["fits"] if asked else [])]
    lines = [[*head, "less work", "speed-up at least"]]
    for row in rows:
        fits = ["yes" if row.fits else "no"] if asked else []
        lines.append(
            [
                f"{row.length:,} token{'' if row.length == 1 else 's'}",
                str(row.k),
                f"{row.positions:,}" + ("*" if row.in_context is False else ""),
                size(row.kv_bytes),
                size(row.memory_bytes),
                *fits,
                _times(row.work_ratio),
                _times(row.speedup_floor),
            ]
        )
    return aligned(lines)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _legend(found: Sizing, config: SizingConfig, asked: bool) -> list[str]:
    lines = [
        "K = 1       plain mlx-lm on the whole prompt; at any other K all of the prompt merges",
        "encoder     parameters at the default width, bytes in float32",
    ]
    if any(row.in_context is False for row in found.rows):
        lines.append("*           more positions than the model was made for")
    cache = "" if config.kv_bits is None else f", {config.kv_bits} bits each"
    if config.kv_bits is not None and config.quantized_kv_start:
        cache += f" from position {config.quantized_kv_start:,} on"
    lines += [
        f"KV cache    keys and values of the prompt's positions{cache}",
        "memory      weights, encoder, merged blocks, and the room that mlx-lm gives the KV cache;",
        "            activations and generated tokens not counted",
    ]
    if asked:
        lines += [
            f"fits        memory within {USABLE_SHARE:.0%} of what --memory says: about what a "
            "Mac's GPU may use at the",
            "            least; the rest is the system's, and the activations'",
        ]
    return [
        *lines,
        "less work   multiplications at K = 1 over those at this K, the encoder's included",
        "speed-up    the least of time to first token if multiplying and reading weights take all "
        "of it, and a",
        f"            machine multiplies at most {MULTIPLICATIONS_PER_BYTE} times while it reads a "
        "byte: an assumption, not a measurement;",
        "            `kmerge-mlx bench` measures",
    ]


def _binary(memory: int) -> str:
    """Memory as it was asked for."""
    for unit in ("T", "G"):
        if memory >= 1 << _SHIFT[unit]:
            return f"{memory / (1 << _SHIFT[unit]):.6g} {unit}B"
    return f"{memory / (1 << _SHIFT['M']):.6g} MB"
