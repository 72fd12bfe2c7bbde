"""How far a changed model is from the one it was made from, measured on a text.

Owns: what is compared (log-probabilities after merged and after plain prompts, and the merged
embeddings), in bounded memory. Does not know how a model is changed, fused or quantized.

The model as it was is read first, and what it said is kept; then it can be let go. The memory that
takes decides how many positions are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kmerge_mlx.base import find_embedding
from kmerge_mlx.config import DRIFT_BYTES, DRIFT_CHUNK, DRIFT_POSITIONS
from kmerge_mlx.errors import ModelError, PromptError
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.prompts.segments import Segment, wants_special_tokens

Progress = Callable[[int, int], None]

_CHARACTERS = 32  # of a token, at most: so much of a text is read for each one that is wanted


@dataclass(frozen=True)
class Gap:
    """How far log-probabilities moved.

    Args:
        positions: How many positions were compared, each with V log-probabilities.
        max: Largest absolute difference.
        mean: Mean absolute difference.
        same: Share of positions whose likeliest token stayed.
    """

    positions: int
    max: float
    mean: float
    same: float


@dataclass(frozen=True)
class EmbeddingGap:
    """How far merged embeddings moved: the norm of the difference over the norm.

    Args:
        blocks: How many were compared.
        mean: Over the blocks.
        worst: Of one block.
    """

    blocks: int
    mean: float
    worst: float


@dataclass(frozen=True)
class Drift:
    """How far a model moved.

    Args:
        plain: After prompts that are read token by token.
        merged: After prompts whose blocks are merged; None where nothing merges.
        embeddings: Of those blocks; None likewise.
    """

    plain: Gap
    merged: Gap | None = None
    embeddings: EmbeddingGap | None = None


@dataclass(frozen=True)
class Sample:
    """What models are compared on.

    Args:
        plain: Token ids that are read one by one.
        merged: Token ids that are merged; empty where nothing merges.
    """

    plain: list[int]
    merged: list[int]


@dataclass(frozen=True)
class Reading:
    """What a model said of a sample.

    Args:
        plain: Log-probabilities ``(positions, V)`` after the plain prompt, float32, in chunks.
        merged: Those after the merged prompt; empty where nothing merges.
        rows: Merged embeddings ``(N, D)`` of its blocks, float32, or None.
    """

    plain: list[mx.array]
    merged: list[mx.array] = field(default_factory=list)
    rows: mx.array | None = None


def sample(model: nn.Module, tokenizer: Any, text: str | None = None) -> Sample:
    """The token ids on which a model is compared with what is made of it.

    Args:
        model: From :func:`kmerge_mlx.load`, with its adapter if there is one.
        tokenizer: Its tokenizer.
        text: The user's own, or None: ids drawn from all, the same ones each time.

    Returns:
        As many as can be compared in bounded memory, or all of a shorter text.

    Raises:
        PromptError: The text has no token.
    """
    embedding = merged_embedding(model)
    k = 1 if embedding is None else embedding.merge_factor
    vocab_size = find_embedding(model, "the model")[1].weight.shape[0]
    kept = min(DRIFT_POSITIONS, DRIFT_BYTES // (4 * vocab_size))
    each = max(1, kept if k == 1 else kept // 2)
    each = min(each, model.context_length or each)
    if text is None:
        draw, known = random.Random(0), min(vocab_size, len(tokenizer))
        ids = [draw.randrange(known) for _ in range(each * k)]
    else:
        start = text[: each * k * _CHARACTERS]
        special = wants_special_tokens(tokenizer, text)
        # Not verbose: a text past the model's context is cut, and no reason for a warning.
        ids = tokenizer.encode(start, add_special_tokens=special, verbose=False)[: each * k]
    if not ids:
        raise PromptError("the FILEs hold no token: give a text to measure the drift on")
    return Sample(ids[:each], ids if k > 1 else [])


def read(model: nn.Module, given: Sample, progress: Progress | None = None) -> Reading:
    """What a model says at every position of a sample.

    Args:
        model: The one that the sample was made for, or what was made of it.
        given: From :func:`sample`.
        progress: Called with (positions read, positions in all).
    """
    prompts, rows = [given.plain], None
    if given.merged:
        embedding = merged_embedding(model)
        merged = embedding.compress([Segment(given.merged)])
        rows = embedding(mx.array(merged.ids)).astype(mx.float32)
        mx.eval(rows)
        prompts.append(merged.ids)
    total, done, said = sum(map(len, prompts)), 0, []
    for prompt in prompts:
        said.append([])
        for chunk in _log_probabilities(model, prompt):
            said[-1].append(chunk)
            done += chunk.shape[0]
            if progress is not None:
                progress(done, total)
    return Reading(said[0], said[1] if given.merged else [], rows)


def compare(before: Reading, after: Reading) -> Drift:
    """How far the second reading of a sample is from the first.

    Raises:
        ModelError: The second holds numbers that are not finite where the first's are.
    """
    plain = _gap(before.plain, after.plain)
    if before.rows is None or after.rows is None:
        return Drift(plain)
    norms = mx.linalg.norm(before.rows, axis=-1)
    moved = mx.linalg.norm(after.rows - before.rows, axis=-1) / mx.maximum(norms, 1e-30)
    embeddings = EmbeddingGap(moved.size, moved.mean().item(), moved.max().item())
    return Drift(plain, _gap(before.merged, after.merged), embeddings)


def _log_probabilities(model: nn.Module, ids: Sequence[int]) -> Iterator[mx.array]:
    """Log-probabilities ``(n, V)`` of a prompt's positions, a chunk at a time."""
    cache = make_prompt_cache(model)
    for start in range(0, len(ids), DRIFT_CHUNK):
        chunk = mx.array([ids[start : start + DRIFT_CHUNK]])
        logits = model(chunk, cache=cache)[0].astype(mx.float32)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logits, [c.state for c in cache])
        yield logits


def _gap(before: Sequence[mx.array], after: Sequence[mx.array]) -> Gap:
    largest, total, same, positions, numbers = 0.0, 0.0, 0, 0, 0
    for old, new in zip(before, after, strict=True):
        # Equal infinities (tokens that a model rules out) are no difference.
        gap = mx.where(old == new, 0.0, mx.abs(new - old))
        if not mx.isfinite(gap).all().item():
            raise ModelError(
                "the model that was made gives log-probabilities that are no numbers: its dtype "
                "cannot hold what the adapter adds"
            )
        largest = max(largest, gap.max().item())
        total += gap.sum().item()
        same += (old.argmax(-1) == new.argmax(-1)).sum().item()
        positions, numbers = positions + old.shape[0], numbers + gap.size
    return Gap(positions, largest, total / numbers, same / positions)
