"""Which K: what a prompt takes at every merge factor, from a base model's config alone.

Owns the arithmetic on positions, KV cache, encoder, multiplications and memory. The KV cache is
mlx-lm's own, grown in mlx-lm's own steps with arrays that are never evaluated; multiplications come
from the graph of mlx-lm's own model (``tracing.py``). Nothing is measured, and nothing is read but
headers and configs. Does not know tables.

Source: the prefill of ``mlx_lm.generate.generate_step``; arXiv 2604.15153 for the encoder's sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.utils import get_total_parameters

from kmerge_mlx import base
from kmerge_mlx.adapters.schema import EncoderConfig, inner_size
from kmerge_mlx.config import (
    BLOCKS_PER_CHUNK,
    MAX_BLOCKS,
    MULTIPLICATIONS_PER_BYTE,
    GenerationConfig,
)
from kmerge_mlx.errors import ModelError, first_line
from kmerge_mlx.tools import skeleton
from kmerge_mlx.tools.bench import kv_bytes
from kmerge_mlx.tools.tracing import Entry, Trace, trace

MEMORY, CONTEXT, BLOCKS = "memory", "context", "block table"
"""What a prompt's length may be limited by."""

MAX_POSITIONS = 1 << 24
"""Where the search for the longest prompt ends if nothing limits it."""

_ENCODER_ITEM = mx.float32.size  # encoders are made, trained and by default converted in float32


@dataclass(frozen=True)
class SizingConfig:
    """What is calculated.

    Args:
        lengths: T, tokens of each prompt.
        ks: Merge factors; 1 reads every token, and is the reference.
        dtype: To think of the base in, or None: its own.
        usable_bytes: Memory there is for all of it, or None: not asked.
        max_kv_size: Most positions the KV cache keeps, or None.
        kv_bits: To quantize the KV cache to, or None.
        kv_group_size: Of that quantization.
        quantized_kv_start: Position from which it applies.
        prefill_step_size: Positions prefilled at once.
    """

    lengths: tuple[int, ...]
    ks: tuple[int, ...]
    dtype: str | None = None
    usable_bytes: int | None = None
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = GenerationConfig.kv_group_size
    quantized_kv_start: int = GenerationConfig.quantized_kv_start
    prefill_step_size: int = GenerationConfig.prefill_step_size


@dataclass(frozen=True)
class BaseSizes:
    """A base model.

    Args:
        model_type: Its architecture.
        dtype: Of its embeddings, and so of its KV cache.
        parameters: How many numbers it holds, before any quantization.
        weight_bytes: Bytes they take, after it.
        hidden_size: D.
        context_length: Positions it was made for, or None: its config does not say.
        has_weights: Whether this is of its weights files, or of its config alone.
        obeys_max_kv_size: Whether mlx-lm limits its KV cache where asked to.
    """

    model_type: str
    dtype: str
    parameters: int
    weight_bytes: int
    hidden_size: int
    context_length: int | None
    has_weights: bool
    obeys_max_kv_size: bool


@dataclass(frozen=True)
class Factor:
    """One merge factor.

    Args:
        k: K.
        encoder_parameters: Of an encoder of the default width; 0 at K = 1.
        encoder_bytes: In float32.
        longest_prompt: Most original tokens that fit, or None: not asked, or no limit found.
        limited_by: What ends there: ``memory``, ``context``, ``block table``; or None.
    """

    k: int
    encoder_parameters: int
    encoder_bytes: int
    longest_prompt: int | None
    limited_by: str | None


@dataclass(frozen=True)
class Row:
    """One merge factor at one length, batch size 1.

    Args:
        k: K.
        length: T, original tokens of the prompt, all of them merged.
        positions: Positions prefilled: ceil(T / K).
        in_context: Whether the model was made for so many, or None: its config does not say.
        kv_bytes: Keys and values of those positions, as ``kmerge-mlx bench`` counts them.
        memory_bytes: Weights, encoder, merged blocks, and all the room that the KV cache takes.
        fits: Whether that is within the usable memory, or None: not asked.
        multiplications: Of reading the prompt, the encoder's included, or None: not told.
        weight_traffic_bytes: Weights read for it, once for each step of the prefill.
        work_ratio: Multiplications of K = 1 over these, or None.
        speedup_floor: The least speed-up over K = 1, as :func:`floor` assumes, or None.
    """

    k: int
    length: int
    positions: int
    in_context: bool | None
    kv_bytes: int
    memory_bytes: int
    fits: bool | None
    multiplications: int | None
    weight_traffic_bytes: int
    work_ratio: float | None
    speedup_floor: float | None


@dataclass(frozen=True)
class Sizing:
    """All that was calculated; ``rows`` are by length and then by K."""

    base: BaseSizes
    factors: tuple[Factor, ...]
    rows: tuple[Row, ...]


def calculate(path_or_hf_repo: str, config: SizingConfig) -> Sizing:
    """Calculates what prompts take at every merge factor, of which 1 is always one.

    Args:
        path_or_hf_repo: Base model, a folder, a hub repo id (no weights are fetched), or
            ``bundled``.
        config: What to calculate.

    Raises:
        ModelError: The base cannot be found, merged prompts cannot be read by it, or its sizes
            cannot be told from its config.
    """
    path = base.resolve(path_or_hf_repo, weights=False)
    model_config = base.read_config(path)
    model = skeleton.build(path, model_config, path_or_hf_repo, config.dtype)
    calculator = _Calculator(model, config, path_or_hf_repo, base.context_length(model_config))
    ks = sorted({1, *config.ks})
    rows = []
    for length in config.lengths:
        reference = calculator.row(1, length, None)
        rows += [reference, *(calculator.row(k, length, reference) for k in ks[1:])]
    sizes = BaseSizes(
        model_type=model_config["model_type"],
        dtype=base.dtype_name(calculator.dtype),
        parameters=get_total_parameters(model),
        weight_bytes=calculator.weight_bytes,
        hidden_size=calculator.hidden_size,
        context_length=calculator.context_length,
        has_weights=skeleton.has_weights(path),
        obeys_max_kv_size=not hasattr(model, "make_cache"),  # mlx-lm's own condition
    )
    return Sizing(sizes, tuple(calculator.factor(k) for k in ks), tuple(rows))


def floor(whole: tuple[int, int], merged: tuple[int, int]) -> float:
    """The least speed-up that merging gives, where multiplying and reading weights take the time.

    A machine multiplies b times while it reads a byte. Reading every token takes at least the time
    of its multiplications, M, and at least that of the weights it reads, b * W; reading merged
    positions at most that of both, one after the other: M' + b * W'. The quotient is least at
    b = M / W, or at the largest b there is: ``MULTIPLICATIONS_PER_BYTE``. This assumes that a
    machine multiplies no faster in a long prompt than in a short one.

    Args:
        whole: Multiplications, and bytes of weights read, at K = 1.
        merged: The same with merging, the encoder's included.
    """
    balance = min(MULTIPLICATIONS_PER_BYTE, whole[0] / whole[1])
    return whole[0] / (merged[0] + balance * merged[1])


def steps(positions: int, size: int) -> Iterator[int]:
    """How mlx-lm prefills: in steps of that size, and the last position by itself."""
    for start in range(0, positions - 1, size):
        yield min(size, positions - 1 - start)
    yield 1


class _Calculator:
    """The sizes of one base model."""

    def __init__(
        self, model: nn.Module, config: SizingConfig, name: str, context_length: int | None
    ):
        _, table = base.find_embedding(model, name)
        looked_up = table(mx.array([0]))
        self.dtype, self.hidden_size = looked_up.dtype, looked_up.shape[-1]
        self.context_length = context_length
        self.weight_bytes = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
        self._config = config
        self._trace = trace(model, name)
        self._cache = _Cache(model, config, self._trace, name)
        self._windows = _windows(self._trace, self._cache.windows)

    def row(self, k: int, length: int, reference: Row | None) -> Row:
        """One merge factor at one length; the reference is K = 1 at the same."""
        positions = -(-length // k)
        usable, context = self._config.usable_bytes, self.context_length
        memory = self._memory(k, positions)
        work, traffic = self._multiplications(k, positions), self._weight_traffic(k, positions)
        whole = None if reference is None else reference.multiplications
        return Row(
            k,
            length,
            positions,
            None if context is None else positions <= context,
            self._cache.bytes(positions)[0],
            memory,
            None if usable is None else memory <= usable,
            work,
            traffic,
            whole / work if whole and work else None,
            floor((whole, reference.weight_traffic_bytes), (work, traffic))
            if whole and work
            else None,
        )

    def factor(self, k: int) -> Factor:
        """One merge factor, whatever the length."""
        parameters = _encoder_parameters(k, self.hidden_size)
        longest, limit = self._longest(k)
        return Factor(k, parameters, parameters * _ENCODER_ITEM, longest, limit)

    def _longest(self, k: int) -> tuple[int | None, str | None]:
        """Most tokens that fit, and what ends there: a search over whole positions."""
        usable = self._config.usable_bytes
        if usable is None:
            return None, None
        limits = {CONTEXT: self.context_length, BLOCKS: MAX_BLOCKS if k > 1 else None}
        known = {name: value for name, value in limits.items() if value is not None}
        limit = min(known, key=known.__getitem__, default=None)
        low, high = 0, known.get(limit, MAX_POSITIONS)
        if self._memory(k, high) <= usable:
            return (None, None) if limit is None else (high * k, limit)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._memory(k, middle) <= usable else (low, middle)
        return low * k, MEMORY

    def _memory(self, k: int, positions: int) -> int:
        encoder = _encoder_parameters(k, self.hidden_size) * _ENCODER_ITEM
        blocks = positions * self.hidden_size * self.dtype.size if k > 1 else 0
        return self.weight_bytes + encoder + blocks + self._cache.bytes(positions)[1]

    def _multiplications(self, k: int, positions: int) -> int | None:
        if self._windows is None:
            return None
        first, last, before = self._trace.prefill, self._trace.last, positions - 1
        total = before * first.linear + last.linear
        # The prefill leaves out what its KV cache does not need: the last layer's attention.
        for count, window in zip(first.attention, self._windows, strict=False):
            total += count * _pairs(before, window)
        for count, window in zip(last.attention, self._windows, strict=True):
            total += count * min(positions, window or positions)
        return total + positions * _encoder_multiplications(k, self.hidden_size)

    def _weight_traffic(self, k: int, positions: int) -> int:
        chunks = -(-(positions - 1) // self._config.prefill_step_size)
        read = chunks * self._trace.prefill.weight_bytes + self._trace.last.weight_bytes
        encoder = _encoder_parameters(k, self.hidden_size) * _ENCODER_ITEM
        return read + encoder * -(-positions // BLOCKS_PER_CHUNK)


class _Cache:
    """mlx-lm's KV cache of a model, as large as a prompt makes it."""

    def __init__(self, model: nn.Module, config: SizingConfig, trace: Trace, name: str):
        self._model, self._config, self._name = model, config, name
        self._known: dict[int, tuple[int, int]] = {}
        pairs = zip(self._fresh(), trace.entries, strict=True)
        kinds = [(_window(cache), entry) for cache, entry in pairs]
        self.windows = [window for window, entry in kinds if entry is not None]
        # Layers of a kind are alike: one of them is enough.
        counts = Counter(kind for kind in kinds if kind[1] is not None)
        self._layers = [(kinds.index(kind), kind[1], count) for kind, count in counts.items()]

    def bytes(self, positions: int) -> tuple[int, int]:
        """Bytes held for a prompt of so many positions, and the most that it takes meanwhile."""
        if positions not in self._known:
            sizes = [(self._grown(i, e, positions), n) for i, e, n in self._layers]
            held, room = (sum(size[part] * n for size, n in sizes) for part in (0, 1))
            self._known[positions] = held, room
        return self._known[positions]

    def _fresh(self) -> list[Any]:
        return make_prompt_cache(self._model, self._config.max_kv_size)

    def _grown(self, layer: int, entry: Entry, positions: int) -> tuple[int, int]:
        config, room = self._config, 0
        cache = [self._fresh()[layer]]
        try:
            for count in steps(positions, config.prefill_step_size):
                shape = (1, entry.heads, count)
                keys = mx.zeros((*shape, entry.key_size), entry.dtype)
                values = mx.zeros((*shape, entry.value_size), entry.dtype)
                cache[0].update_and_fetch(keys, values)
                room = max(room, cache[0].nbytes)
                maybe_quantize_kv_cache(
                    cache, config.quantized_kv_start, config.kv_group_size, config.kv_bits
                )
        except (NotImplementedError, ValueError) as error:
            raise ModelError(
                f"mlx-lm cannot quantize the KV cache of {self._name} (--kv-bits, "
                f"--kv-group-size): {first_line(error)}"
            ) from error
        return kv_bytes(cache), room


def _window(cache: Any) -> int | None:
    """How many positions a layer looks back, or None: to the first."""
    return cache.max_size if isinstance(cache, RotatingKVCache) else None


def _windows(trace: Trace, layers: Sequence[int | None]) -> list[int | None] | None:
    """The window of every product of the attention, or None where that cannot be told."""
    products = len(trace.last.attention)
    if len(set(layers)) == 1:
        return layers[:1] * products
    if products == 2 * len(layers):
        return [window for window in layers for _ in range(2)]
    return None


def _pairs(positions: int, window: int | None) -> int:
    """Pairs of a query and a key that causal attention needs."""
    full = min(positions, window or positions)
    return full * (full + 1) // 2 + (positions - full) * full


def _encoder_parameters(k: int, hidden_size: int) -> int:
    return 0 if k == 1 else _encoder(k, hidden_size).num_parameters


def _encoder_multiplications(k: int, hidden_size: int) -> int:
    """For each block: every weight once, and no bias."""
    if k == 1:
        return 0
    shapes = _encoder(k, hidden_size).shapes().values()
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)


def _encoder(k: int, hidden_size: int) -> EncoderConfig:
    return EncoderConfig(k, hidden_size, inner_size(k, hidden_size))
