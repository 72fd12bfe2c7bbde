"""Calculates what a prompt takes at each merge factor, from a base model's config alone.

Source: the prefill of ``mlx_lm.generate.generate_step``, ``mlx_lm.models.cache``; arXiv 2604.15153
for the encoder's sizes.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import get_total_parameters, load_model

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import ENCODER, carried_by, look_up, read_adapter
from kmerge_mlx.adapters.schema import EncoderConfig, inner_size
from kmerge_mlx.config import BLOCKS_PER_CHUNK, MAX_BLOCKS, MULTIPLICATIONS_PER_BYTE
from kmerge_mlx.errors import ModelError, first_line, short
from kmerge_mlx.model import output_head, widen
from kmerge_mlx.settings import CacheSettings
from kmerge_mlx.window_encoder import TOKENS_AT_ONCE

MEMORY, CONTEXT, BLOCKS = "memory", "context", "block table"
"""What a prompt's length may be limited by."""

MAX_POSITIONS = 1 << 24
"""Where the search for the longest prompt ends if nothing limits it."""

_DTYPE = ("dtype", "torch_dtype")
_ROOM = 256  # positions by which mlx-lm's KV cache grows
_FLOAT32 = 4  # bytes; encoders are made, trained and by default converted in it
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_FILLS_CACHE = re.compile(r"\.([kv]|qkv|in|kv_a)_proj")  # what the last layer needs for its cache


@dataclass(frozen=True)
class SizingConfig:
    """What is calculated."""

    lengths: tuple[int, ...]  # T, tokens of each prompt
    ks: tuple[int, ...]  # merge factors; 1 reads every token, and is the reference
    dtype: str | None = None  # the base's; None: its own
    usable_bytes: int | None = None  # memory for all of it; None: not asked
    max_kv_size: int | None = None  # most positions that the KV cache keeps
    kv_bits: int | None = None  # to quantize it to, in groups, from a position on
    kv_group_size: int = CacheSettings.kv_group_size
    quantized_kv_start: int = CacheSettings.quantized_kv_start
    prefill_step_size: int = CacheSettings.prefill_step_size


@dataclass(frozen=True)
class _LayerCache:
    """What one layer's cache keeps: keys and values, or a state of one size."""

    heads: int = 0  # of keys and values
    widths: tuple[int, int] = (0, 0)  # of a key and a value
    item: int = 0  # bytes of one of their numbers
    window: int | None = None  # most positions that it keeps
    state_bytes: int = 0
    state_size: int = 0  # numbers


def calculate(name: str, settings: SizingConfig, own_k: bool = False) -> dict[str, Any]:
    """Calculates what prompts take at every merge factor, of which 1 is always one.

    Returns ``base``, ``factors`` by K, and ``rows`` by length and then by K, all JSON-ready: see
    docs/choosing-k.md. No weights are fetched. With ``own_k``, a folder with a window encoder is
    calculated for the K of that alone.
    """
    path = base.resolve(name, weights=False)
    config, has_weights = base.read_config(path), _has_weights(path)
    model = _build(path, config, name, settings.dtype, has_weights)
    found = Calculator(model, config, settings, name)
    found.windows = _window_cost(carried_by(path))
    wanted = found.windows[:1] if own_k and found.windows else settings.ks
    ks, rows = sorted({1, *wanted}), []
    for length in settings.lengths:
        reference = found.row(1, length, None)
        rows += [reference, *(found.row(k, length, reference) for k in ks[1:])]
    sizes = {
        "model_type": config["model_type"],
        "dtype": base.dtype_name(found.dtype),  # of its embeddings
        "parameters": get_total_parameters(model),  # before any quantization
        "weight_bytes": found.weight_bytes,  # after it
        "hidden_size": found.hidden_size,
        "context_length": found.context_length,
        "has_weights": has_weights,  # whether the headers of its weights files were read
        "obeys_max_kv_size": not hasattr(model, "make_cache"),  # mlx-lm's own condition
    }
    return {"base": sizes, "factors": [found.factor(k) for k in ks], "rows": rows}


def floor(whole: tuple[int, int], merged: tuple[int, int]) -> float:
    """The least speed-up if multiplying and reading weights take all of the time.

    A machine multiplies b times while it reads a byte. Reading every token takes at least the time
    of its multiplications, M, and at least that of its weights, b * W; reading merged positions at
    most M' + b * W'. The quotient is least at b = M / W, or at ``MULTIPLICATIONS_PER_BYTE``.
    ``whole`` is (M, W), ``merged`` (M', W'), the encoder's included.
    """
    balance = min(MULTIPLICATIONS_PER_BYTE, whole[0] / whole[1])
    return whole[0] / (merged[0] + balance * merged[1])


@dataclass(frozen=True)
class _Encoder:
    """What an encoder costs."""

    parameters: int = 0
    bytes: int = 0
    multiplications: int = 0  # for a block; without biases
    at_once: int = BLOCKS_PER_CHUNK  # blocks for which its weights are read once


class Calculator:
    """The sizes of one base model."""

    windows: tuple[int, _Encoder] | None = None  # K and cost of the window encoder in its folder

    def __init__(
        self, model: nn.Module, config: Mapping[str, Any], settings: SizingConfig, name: str
    ):
        _, table = base.find_embedding(model, name)
        looked_up = table(mx.array([0]))
        self.dtype, self.hidden_size = looked_up.dtype, looked_up.shape[-1]
        self.context_length = base.context_length(config)
        self.weight_bytes = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
        self._settings, text = settings, base.text_config(config)
        self._layers = _caches(model, name, settings.max_kv_size)
        self._heads = text.get("num_attention_heads", 0)
        used = text.get("num_experts_per_tok", text.get("experts_per_token"))
        self._fill, self._full = _passes(model, table, used)
        if settings.kv_bits is not None and any(
            layer.heads and (layer.window or any(w % settings.kv_group_size for w in layer.widths))
            for layer in self._layers
        ):
            raise ModelError(
                f"mlx-lm cannot quantize the KV cache of {name} by `kv_bits`: it has sliding "
                f"windows, or `kv_group_size` {settings.kv_group_size} does not divide its heads"
            )

    def row(self, k: int, length: int, reference: dict[str, Any] | None) -> dict[str, Any]:
        """One merge factor at one length, batch size 1; the reference is K = 1 at the same."""
        positions = -(-length // k)
        usable, context = self._settings.usable_bytes, self.context_length
        memory = self._memory(k, positions)
        now = self._multiplications(k, positions), self._weight_traffic(k, positions)
        whole = reference and (reference["multiplications"], reference["weight_traffic_bytes"])
        return {
            "k": k,
            "length": length,
            "positions": positions,
            "in_context": None if context is None else positions <= context,
            "kv_bytes": self._cache_bytes(positions, self._is_quantized(positions)),
            "memory_bytes": memory,
            "fits": None if usable is None else memory <= usable,
            "multiplications": now[0],
            "weight_traffic_bytes": now[1],
            "work_ratio": whole and whole[0] / now[0],
            "speedup_floor": whole and floor(whole, now),
        }

    def factor(self, k: int) -> dict[str, Any]:
        """One merge factor, whatever the length."""
        longest, limit = self._longest(k)
        return {
            "k": k,
            "encoder_parameters": self._encoder(k).parameters,
            "encoder_bytes": self._encoder(k).bytes,
            "longest_prompt": longest,
            "limited_by": limit,
        }

    def _longest(self, k: int) -> tuple[int | None, str | None]:
        """Most tokens that fit, and what limits them: a search over whole positions."""
        usable = self._settings.usable_bytes
        if usable is None:
            return None, None
        limits = {} if self.context_length is None else {CONTEXT: self.context_length}
        limits |= {BLOCKS: MAX_BLOCKS} if k > 1 else {}
        limit = min(limits, key=limits.__getitem__, default=None)
        counts = range(1, limits.get(limit, MAX_POSITIONS) + 1)
        positions = bisect_right(counts, usable, key=lambda count: self._memory(k, count))
        if positions < len(counts):
            return positions * k, MEMORY
        return (None, None) if limit is None else (positions * k, limit)

    def _encoder(self, k: int) -> _Encoder:
        """The encoder for K: the one that there is, or one of the default size in float32."""
        if k == 1:
            return _Encoder()
        if self.windows is not None and self.windows[0] == k:
            return self.windows[1]
        sizes = EncoderConfig(k, self.hidden_size, inner_size(k, self.hidden_size))
        multiplications = sum(out * width for out, width in sizes.layers().values())
        parameters = sizes.num_parameters
        return _Encoder(parameters, parameters * _FLOAT32, multiplications)

    def _cache_bytes(self, positions: int, quantized: bool, room: bool = False) -> int:
        """Bytes of so many positions, or of the room that mlx-lm makes for them."""
        settings, total = self._settings, 0
        count = -(-positions // _ROOM) * _ROOM if room else positions
        for layer in self._layers:
            # A step of the prefill comes on top of a window.
            step = min(settings.prefill_step_size, positions) - 1 if room else 0
            kept = min(count, layer.window + step) if layer.window else count
            bits = 8 * layer.item
            if quantized:  # a scale and a bias for each group
                bits = settings.kv_bits + 16 * layer.item / settings.kv_group_size
            total += int(kept * layer.heads * sum(layer.widths) * bits) // 8 + layer.state_bytes
        return total

    def _is_quantized(self, positions: int) -> bool:
        settings = self._settings
        return settings.kv_bits is not None and positions >= settings.quantized_kv_start

    def _memory(self, k: int, positions: int) -> int:
        blocks = positions * self.hidden_size * self.dtype.size if k > 1 else 0
        quantized = self._is_quantized(positions)
        cache = self._cache_bytes(positions, quantized, room=True)
        if quantized:  # the cache is whole until a step of the prefill passes the start
            step, start = self._settings.prefill_step_size, self._settings.quantized_kv_start
            before = min(max(positions - 1, start, 1), -(-max(1, start) // step) * step)
            cache = max(cache, self._cache_bytes(before, False, room=True))
        return self.weight_bytes + self._encoder(k).bytes + blocks + cache

    def _multiplications(self, k: int, positions: int) -> int:
        before = positions - 1
        total = before * self._fill[0] + self._full[0]
        for i, layer in enumerate(self._layers):
            pair, window = self._heads * sum(layer.widths), layer.window or positions
            # The prefill leaves out what its cache does not need: the last layer's attention.
            if i + 1 < len(self._layers):
                total += pair * _pairs(before, window)
            total += pair * min(positions, window)
            total += 3 * layer.state_size * positions  # decayed, updated and read
        return total + positions * self._encoder(k).multiplications

    def _weight_traffic(self, k: int, positions: int) -> int:
        steps = -(-(positions - 1) // self._settings.prefill_step_size)
        encoder = self._encoder(k)
        read = encoder.bytes * -(-positions // encoder.at_once)
        return steps * self._fill[1] + self._full[1] + read


def _window_cost(carried: Path | None) -> tuple[int, _Encoder] | None:
    """K and cost of the window encoder in an adapter's folder; None for another encoder."""
    folder, merge = look_up(carried).choose() if carried else (None, None)
    if merge is None or not merge.has_window:
        return None
    sizes, own = merge.encoder, folder / ENCODER
    config, name = base.read_config(own), str(own)
    model = _build(own, config, name, None, _has_weights(own))
    _, (whole, _) = _passes(model, base.find_embedding(model, name)[1], None)
    # Nothing is multiplied with the table, which counts there as the head.
    per_token = whole - config["vocab_size"] * sizes.encoder_size
    heads, pairs = config.get("num_attention_heads", 0), (sizes.window + 1) / 2
    attention = sum(heads * sum(layer.widths) * pairs for layer in _caches(model, name, None))
    tensors = [model.parameters(), read_adapter(folder, merge).encoder_weights]
    return sizes.merge_factor, _Encoder(
        get_total_parameters(model) + sizes.num_parameters,
        sum(array.nbytes for _, array in tree_flatten(tensors)),
        sizes.merge_factor * (per_token + int(attention)) + sizes.num_parameters,
        max(1, TOKENS_AT_ONCE // sizes.merge_factor),
    )


def _pairs(positions: int, window: int) -> int:
    """Pairs of a query and a key that causal attention needs."""
    full = min(positions, window)
    return full * (full + 1) // 2 + (positions - full) * full


def _passes(model: nn.Module, table: nn.Module, used: int | None) -> tuple[list[int], list[int]]:
    """Multiplications with weights, and their bytes: to fill the cache, and for the last position.

    ``used`` is how many experts of a layer a position uses, or None: all.
    """
    _, head = output_head(model) or (None, table)
    modules = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    last = max((int(found[1]) for path, _ in modules if (found := _LAYER.search(path))), default=0)
    fill, full = [0, 0], [0, 0]
    for path, module in modules:
        weight = module.get("weight")
        looked_up = module is table and module is not head
        if weight is None or weight.ndim < 2 or isinstance(module, nn.Conv1d) or looked_up:
            continue
        count = weight.size * 32 // module.bits if "scales" in module else weight.size
        if weight.ndim == 3 and used:  # experts
            count = count // weight.shape[0] * used
        size = sum(array.nbytes for _, array in tree_flatten(module.parameters()))
        full = [full[0] + count, full[1] + size]
        layer = _LAYER.search(path)
        in_last = layer is not None and int(layer[1]) == last
        if module is not head and (not in_last or _FILLS_CACHE.search(path)):
            fill = [fill[0] + count, fill[1] + size]
    return fill, full


def _caches(model: nn.Module, name: str, max_kv_size: int | None) -> list[_LayerCache]:
    """What each layer caches: the model reads placeholders, and nothing is evaluated."""
    cache = make_prompt_cache(model, max_kv_size)
    kinds = {type(entry) for entry in cache}
    if others := kinds - {KVCache, RotatingKVCache, ArraysCache}:
        listed = ", ".join(sorted(kind.__name__ for kind in others))
        raise ModelError(
            f"{name} keeps {listed}, which the calculator does not know; `kmerge-mlx bench` "
            "measures it"
        )
    names, arrays = zip(*tree_flatten(model.parameters()), strict=True)

    def forward(ids: mx.array, *placeholders: mx.array) -> mx.array:
        model.update(tree_unflatten(list(zip(names, placeholders, strict=True))))
        return model(ids, cache=cache)

    try:
        with mx.stream(mx.cpu):
            ids = mx.zeros((1, 2), mx.int32)
            mx.export_function(lambda _: None, forward, ids, *arrays)
    except base.LOAD_ERRORS as error:
        raise ModelError(f"{name} cannot be read: {first_line(error)}") from error
    finally:
        model.update(tree_unflatten(list(zip(names, arrays, strict=True))))
    return [_layer_cache(entry) for entry in cache]


def _layer_cache(entry: Any) -> _LayerCache:
    if isinstance(entry, ArraysCache):
        arrays = [array for array in entry.cache if array is not None]
        state_bytes, state_size = (sum(getattr(a, n) for a in arrays) for n in ("nbytes", "size"))
        return _LayerCache(state_bytes=state_bytes, state_size=state_size)
    if entry.keys is None:
        return _LayerCache()
    _, heads, _, width = entry.keys.shape
    window = entry.max_size if isinstance(entry, RotatingKVCache) else None
    return _LayerCache(heads, (width, entry.values.shape[-1]), entry.keys.dtype.size, window)


def _has_weights(path: Path) -> bool:
    """Whether all weights files of a base are in its folder: their names count them."""
    names = [file.name for file in path.glob("model*.safetensors")]
    counts = {int(m[1]) for name in names if (m := re.search(r"-of-(\d+)\.", name))}
    return bool(names) and all(count == len(names) for count in counts)


def _build(
    path: Path, config: Mapping[str, Any], name: str, dtype: str | None, has_weights: bool
) -> nn.Module:
    """mlx-lm's model for a config: it has shapes and dtypes, and is never evaluated."""
    try:
        if has_weights:
            model, _ = load_model(path, lazy=True, model_config=dict(config))
            widen(model, path)
        else:
            model = _from_config(config, name)
    except base.LOAD_ERRORS as error:
        raise ModelError(f"cannot build {name}: {first_line(error)}") from error
    if dtype is None and not has_weights:
        entries = [part.get(key) for part in (base.text_config(config), config) for key in _DTYPE]
        dtype = next((entry for entry in entries if entry is not None), None)
        if dtype not in [*base.DTYPES]:  # it may be anything, a list too
            raise ModelError(f"config.json of {name} specifies dtype {short(dtype)}: give `dtype`")
    if dtype is not None:
        model.set_dtype(base.DTYPES[dtype])
    return model


def _from_config(config: Mapping[str, Any], name: str) -> nn.Module:
    quantization = config.get("quantization")
    if quantization is None and config.get("quantization_config") is not None:
        raise ModelError(
            f"{name} is quantized by {short(config['quantization_config'])}, and its config does "
            "not specify which layers are: give a folder that holds its weights"
        )
    model = base.skeleton(config)
    if quantization is None:
        return model
    group_size, own = quantization["group_size"], getattr(model, "quant_predicate", None)

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        """What ``mlx_lm.convert`` quantizes: the config names only what differs."""
        if path in quantization:
            return quantization[path]
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        return True if own is None else own(path, module)

    mode = quantization.get("mode", "affine")
    nn.quantize(model, group_size, quantization["bits"], mode=mode, class_predicate=wanted)
    return model
