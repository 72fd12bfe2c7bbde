"""What one forward pass multiplies and caches, read from the graph that mlx-lm's model builds.

Owns the trace: the model runs once on placeholders, and MLX hands over the operations that an
evaluation would do, with their shapes. So experts, tied heads, grouped heads and whatever a future
architecture does are counted as they are, and nothing is evaluated. Does not know prompts or K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from kmerge_mlx import base
from kmerge_mlx.errors import ModelError, first_line

TOKENS = 37
"""Positions of the traced pass: more than one, since models treat one alone otherwise."""

MULTIPLIES = frozenset({"Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM", "QQMatmul"})
"""MLX's matrix products; the first operand's last axis is summed over."""

KINDS = (KVCache, RotatingKVCache)


@dataclass(frozen=True)
class Pass:
    """What a pass does; the model's own sizes decide, never its values.

    Args:
        linear: Multiplications with weights, for each position.
        attention: Multiplications for each pair of a query's and a key's position, in the order of
            the operations: scores and their weighted sum, layer by layer.
        weight_bytes: Bytes of the weights that it multiplies with.
    """

    linear: int
    attention: tuple[int, ...]
    weight_bytes: int


@dataclass(frozen=True)
class Entry:
    """What one layer's KV cache is made of.

    Args:
        heads: Heads that keys and values have.
        key_size: Width of a key.
        value_size: Width of a value.
        dtype: Of both.
    """

    heads: int
    key_size: int
    value_size: int
    dtype: mx.Dtype


@dataclass(frozen=True)
class Trace:
    """Both passes of a prefill, and the cache they fill.

    Args:
        prefill: A chunk of the prompt: all that its KV cache needs, and no more.
        last: The prompt's last token: everything, the output head included.
        entries: For each layer of the KV cache what it holds, or None: nothing.
    """

    prefill: Pass
    last: Pass
    entries: tuple[Entry | None, ...]


def trace(model: nn.Module, name: str) -> Trace:
    """Runs a model on placeholders.

    Args:
        model: mlx-lm's, evaluated or not.
        name: What to call it in an error.

    Raises:
        ModelError: A cache that is not keys and values by position, or a model that looks at
            values while it runs.
    """
    _check_cache(make_prompt_cache(model), name)
    prefill, _ = _run(model, name, logits=False)
    last, cache = _run(model, name, logits=True)
    return Trace(prefill, last, tuple(map(_entry, cache)))


def _check_cache(cache: Sequence[Any], name: str) -> None:
    others = sorted({type(entry).__name__ for entry in cache if type(entry) not in KINDS})
    if others:
        raise ModelError(
            f"{name} keeps {', '.join(others)}, not keys and values of every position alone: its "
            "sizes cannot be told from its config; `kmerge-mlx bench` measures them"
        )


def _entry(cache: Any) -> Entry | None:
    if cache.empty():
        return None
    _, heads, _, key_size = cache.keys.shape
    return Entry(heads, key_size, cache.values.shape[-1], cache.keys.dtype)


def _run(model: nn.Module, name: str, logits: bool) -> tuple[Pass, Sequence[Any]]:
    parameters = dict(tree_flatten(model.parameters()))
    cache = make_prompt_cache(model)
    records: list[dict[str, Any]] = []

    def forward(ids: mx.array, **placeholders: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(placeholders.items())))
        out = model(ids, cache=cache)
        if logits:
            return [out]
        return [array for c in cache if not c.empty() for array in (c.keys, c.values)]

    try:
        # On the CPU attention is spelled out in matrix products, on every machine.
        with mx.stream(mx.cpu):
            ids = mx.zeros((1, TOKENS), mx.int32)
            mx.export_function(records.append, forward, ids, **parameters)
    except base.LOAD_ERRORS as error:
        raise ModelError(f"{name} cannot be traced: {first_line(error)}") from error
    finally:
        model.update(tree_unflatten(list(parameters.items())))
    return _count(records, parameters), cache


def _count(records: Sequence[Mapping[str, Any]], parameters: Mapping[str, mx.array]) -> Pass:
    weights = _weights(records)
    linear, attention, used = 0, [], set()
    for record in records:
        if record["type"] != "primitive" or record["name"] not in MULTIPLIES:
            continue
        (_, left, _), (right, _, _) = record["inputs"][:2]
        count = sum(math.prod(shape) for _, shape, _ in record["outputs"]) * left[-1]
        if right in weights:
            linear += count
            used |= set().union(*(weights.get(name, ()) for name, _, _ in record["inputs"]))
        else:
            attention.append(count // TOKENS**2)
    read = sum(parameters[name].nbytes for name in used)
    return Pass(linear // TOKENS, tuple(attention), read)


def _weights(records: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """Arrays of the graph that are made of weights alone, and of which."""
    known: dict[str, frozenset[str]] = {}
    for record in records:
        if record["type"] == "keyword_inputs":
            known |= {array: frozenset([name]) for name, array in record["keywords"]}
        elif record["type"] == "constants":
            known |= {array: frozenset() for array, _ in record["constants"]}
        elif record["type"] == "primitive":
            inputs = [name for name, _, _ in record["inputs"]]
            if all(name in known for name in inputs):
                roots = frozenset().union(*(known[name] for name in inputs))
                known.update((name, roots) for name, _, _ in record["outputs"])
    return known
