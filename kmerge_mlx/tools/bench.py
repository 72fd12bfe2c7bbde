"""Times merged prompts against plain mlx-lm, side by side in one process.

Several sides read each prompt of T tokens in turn: plain mlx-lm (the reference), and for each K
plain mlx-lm on ceil(T/K) tokens (the floor: what so many positions cost anyway) and merged blocks.
Prompts are random token ids: time and memory depend on shapes alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from kmerge_mlx import base, model
from kmerge_mlx.adapters.folder import read_adapter
from kmerge_mlx.adapters.schema import (
    EncoderConfig,
    LoRAConfig,
    LoRASpec,
    MergeConfig,
    inner_size,
)
from kmerge_mlx.errors import PromptError, findings
from kmerge_mlx.generation.cost import Spread, time_reading
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.source import Source
from kmerge_mlx.tools.random_base import PAD_TOKEN_ID, RandomBase
from kmerge_mlx.virtual_tokens import CompressedPrompt, MergedEmbedding


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured, and how often."""

    lengths: tuple[int, ...]  # T, tokens of each prompt
    num_trials: int  # rounds that count; one more for each length, the first, warms up
    generation_tokens: int  # generated after each prompt
    prefill_step_size: int  # positions prefilled at once
    seed: int  # of the random prompts
    delay: int  # seconds of rest before each run


@dataclass(frozen=True, eq=False)
class Side:
    """One way to read a prompt."""

    k: int
    llm: nn.Module
    embedding: MergedEmbedding | None = None  # None: the first ceil(T/K) tokens, unmerged
    unread_bytes: int = 0  # of weights in memory that it does not read: the others' encoders, LoRA

    def positions(self, length: int) -> int:
        """Positions that a prompt of so many tokens takes."""
        return -(-length // self.k)


@dataclass(frozen=True)
class Trial:
    """One run: a prompt read, and some tokens generated."""

    tokens: int  # of the prompt
    positions: int  # prefilled
    time_to_first_token: float  # seconds from the prompt's ids, compressing included
    generation_tps: float | None  # tokens per second after the first one; None: that was all
    peak_bytes: int  # most memory at once: the weights that this side reads, cache, activations
    kv_bytes: int  # of the cache when the first token is sampled: exactly the prompt


@dataclass(frozen=True)
class Figures:
    """What one side did with prompts of one length; units as in :class:`Trial`."""

    time_to_first_token: Spread
    prompt_tps: Spread  # original tokens per second until the first token
    generation_tps: Spread | None
    peak_bytes: Spread
    kv_bytes: int
    cold_time_to_first_token: float  # in the round that warms up, where kernels are compiled

    @classmethod
    def of(cls, runs: Sequence[Trial]) -> Figures:
        """The figures of at least two runs, of which the first warms up."""
        cold, *trials = runs
        seconds = Spread.of(t.time_to_first_token for t in trials)
        read = Spread.of(t.tokens / t.time_to_first_token for t in trials)
        speeds = [t.generation_tps for t in trials if t.generation_tps is not None]
        peak = Spread.of(t.peak_bytes for t in trials)
        return cls(
            seconds,
            read,
            Spread.of(speeds) if speeds else None,
            peak,
            trials[0].kv_bytes,
            cold.time_to_first_token,
        )


@dataclass(frozen=True)
class Row:
    """One merge factor at one length; K = 1 is plain mlx-lm, and has none of the last three."""

    k: int
    length: int  # T, tokens of the prompt
    positions: int  # prefilled
    figures: Figures
    floor: Figures | None = None  # plain mlx-lm on as many ordinary tokens
    speedup: Spread | None = None  # time to first token of K = 1 over this one's, in each round
    overhead: Spread | None = None  # time to first token over the floor's, in each round


def load_sides(
    source: Source | RandomBase,
    merged: Mapping[int, Source | None],
    lengths: Sequence[int],
    lora_rank: int,
) -> list[Side]:
    """Loads a base once, and for each K a model over the same weights.

    ``merged`` has for each K, above 1, its adapter, or None: an untrained encoder of the default
    size, and LoRA of ``lora_rank`` (0: none) on every linear layer and the head. The reference
    comes first, then for each K the floor and the merged side.
    """
    _check_lengths(lengths, merged, base.context_length(source.config))
    if isinstance(source, RandomBase):
        source.check_memory(lengths, merged)
    adapters = {
        k: one and read_adapter(one.adapter, one.merge) for k, one in sorted(merged.items())
    }
    for adapter in filter(None, adapters.values()):
        model.check_fit(adapter, source.config, source.model)
    plain, tokenizer = _open(source)
    readers = [(1, plain)]
    for k, adapter in adapters.items():
        # Only its modules are wanted: the lazy weights are never read.
        llm, _ = _open(source, lazy=True)
        llm.update(plain.parameters())
        max_blocks = Side(k, llm).positions(max(lengths))
        if adapter is None:
            _, table = base.find_embedding(llm, source.model)
            d = table(mx.array([0])).shape[-1]
            tuning, head = LoRAConfig(0), None
            if lora_rank:
                spec = LoRASpec(lora_rank, 1.0)
                tuning, head = model.fresh_lora(llm, spec, len(llm.layers))
            untrained = MergeConfig(EncoderConfig(k, d, inner_size(k, d)), head_lora=head)
            pad = base.default_pad_token_id(tokenizer) if tokenizer else PAD_TOKEN_ID
            model.wire(llm, untrained, tuning, pad, source.model, max_blocks)
            llm.eval()
        else:
            pad = model.padding_of(adapter, tokenizer)
            model.attach(llm, adapter, pad, source.model, max_blocks)
        if isinstance(source, Source):
            model.widen(llm, source.path)  # the adapter: the base's own arrays were cast above
        model.fold_lora(llm)
        mx.eval(llm.parameters())
        readers += [(k, plain), (k, llm)]
    weights = [
        {id(array): array.nbytes for _, array in tree_flatten(_arrays(llm))} for _, llm in readers
    ]
    total = sum({key: size for each in weights for key, size in each.items()}.values())
    return [
        Side(k, llm, model.merged_embedding(llm), total - sum(own.values()))
        for (k, llm), own in zip(readers, weights, strict=True)
    ]


def _open(source: Source | RandomBase, lazy: bool = False) -> tuple[nn.Module, Any]:
    """A base alone, and its tokenizer or None; ``lazy``: its arrays are not to be evaluated."""
    if isinstance(source, RandomBase):
        return source.skeleton() if lazy else source.make(), None
    alone = replace(source, adapter_path=None, adapter=None, merge=None)
    return model.load_source(alone, lazy=lazy)[:2]


def _arrays(llm: nn.Module) -> list[Any]:
    """All that a side reads; a window encoder is not among its model's modules."""
    merged = model.merged_embedding(llm)
    return [llm.parameters(), *([merged.encoder.parameters()] if merged is not None else [])]


def _check_lengths(lengths: Sequence[int], ks: Iterable[int], limit: int | None) -> None:
    problems = [
        f"`length` {length} is more than the model's context of {limit:,} positions, and the "
        "reference reads every token"
        for length in lengths
        if limit is not None and length > limit
    ]
    over = [(k, length) for length in lengths for k in ks if k > length]
    why = "a block would hold more than the prompt"
    problems += [f"`k` {k} is more than `length` {length}: {why}" for k, length in over]
    if problems:
        raise PromptError(findings("nothing was measured", problems))


def measure(
    sides: Sequence[Side],
    config: BenchmarkConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Times every side of :func:`load_sides` on prompts of every length.

    ``progress`` is called between runs with (positions read, positions to be read in all). For
    each length there is a row for K = 1, and then one for each K.
    """
    tables = [base.table_rows(sides[0].llm)]
    tables += [side.embedding.encoder.table_rows or tables[0] for side in sides if side.embedding]
    rng, tokens = Random(config.seed), range(min(tables))
    rounds = range(-1, config.num_trials)  # the first warms up and does not count
    total = sum(side.positions(n) for n in config.lengths for side in sides) * len(rounds)
    done, rows = 0, []
    progress(done, total)
    for length in config.lengths:
        trials: dict[Side, list[Trial]] = {side: [] for side in sides}
        for number in rounds:
            ids = rng.choices(tokens, k=length)
            # Another side begins each time, and every other round is reversed.
            step = -1 if number % 2 else 1
            for i in range(len(sides)):
                side = sides[(number + step * i) % len(sides)]
                trial = _run(side, ids, config)
                trials[side].append(trial)
                done += trial.positions
                progress(done, total)
        rows += _rows(length, trials)
    return rows


def _run(side: Side, ids: list[int], config: BenchmarkConfig) -> Trial:
    """Reads one prompt and generates; the block table is empty before, and again after."""
    tokens = ids[: side.positions(len(ids))] if side.embedding is None else ids

    def compress() -> CompressedPrompt:
        if side.embedding is None:
            return CompressedPrompt(tokens, tokens, [])
        return side.embedding.compress([Segment(tokens)])

    time.sleep(config.delay)
    mx.reset_peak_memory()
    how = {"prefill_step_size": config.prefill_step_size}
    run = time_reading(side.llm, compress, config.generation_tokens, **how)
    peak = mx.get_peak_memory() - side.unread_bytes
    if side.embedding is not None:
        side.embedding.forget_blocks()
    first, last, more = run.seconds[0], run.seconds[-1], len(run.seconds) - 1
    speed = more / (last - first) if more else None
    return Trial(len(tokens), run.positions, first, speed, peak, run.kv_bytes)


def _rows(length: int, trials: Mapping[Side, Sequence[Trial]]) -> list[Row]:
    """The rows of one length; a ratio is of two runs of the same round."""

    def ratios(over: Side, under: Side) -> Spread:
        pairs = zip(trials[over][1:], trials[under][1:], strict=True)
        return Spread.of(a.time_to_first_token / b.time_to_first_token for a, b in pairs)

    figures = {side: Figures.of(runs) for side, runs in trials.items()}
    reference, *others = trials
    rows = [Row(1, length, length, figures[reference])]
    for floor, side in zip(others[::2], others[1::2], strict=True):
        compared = figures[floor], ratios(reference, side), ratios(side, floor)
        rows.append(Row(side.k, length, side.positions(length), figures[side], *compared))
    return rows
