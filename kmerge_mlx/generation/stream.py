"""Generates text from merged prompts: ``stream_generate``, ``generate`` and ``batch_generate``.

Options and response fields are mlx-lm's, without ``verbose``, and with what merging did.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.generate import BatchResponse as HostBatchResponse
from mlx_lm.generate import GenerationResponse as HostResponse
from mlx_lm.generate import stream_generate as host_stream_generate
from mlx_lm.sample_utils import LogitsProcessor

from kmerge_mlx.base import table_rows
from kmerge_mlx.detokenizer import exact
from kmerge_mlx.errors import ModelError, PromptError, first_line
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.prompts.segments import (
    Segment,
    check_ids,
    merged_text,
    segments_of,
    wants_special_tokens,
)
from kmerge_mlx.prompts.tags import Span
from kmerge_mlx.virtual_tokens import CompressedPrompt

Prompt = str | Sequence[int] | mx.array | Sequence[Segment] | CompressedPrompt


@dataclass(kw_only=True)
class GenerationResponse(HostResponse):
    """mlx-lm's response to one generated token, with what merging did.

    ``prompt_tokens`` counts original tokens, and ``prompt_tps`` is original tokens over
    ``time_to_first_token``: the encoder's time is part of reading the prompt.

    Args:
        compressed_tokens: Positions prefilled.
        compression_ratio: ``prompt_tokens / compressed_tokens``.
        time_to_first_token: Seconds from the call to the first token: tokenizing, merging, prefill.
    """

    compressed_tokens: int
    compression_ratio: float
    time_to_first_token: float


@dataclass
class BatchResponse(HostBatchResponse):
    """mlx-lm's batch response, with what merging did.

    Args:
        prompt_tokens: Original tokens of each prompt.
        compressed_tokens: Positions prefilled for each prompt.
        finish_reasons: ``"stop"`` or ``"length"`` for each prompt.
    """

    prompt_tokens: list[int] = field(default_factory=list)
    compressed_tokens: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)


def compress(
    model: nn.Module, tokenizer: Any, prompt: Prompt, k: int | None = None, cached: int = 0
) -> CompressedPrompt:
    """Turns a prompt into the ids that the model reads.

    Args:
        model: A model from :func:`kmerge_mlx.load`.
        tokenizer: Its tokenizer.
        prompt: Text or token ids (all of it merges), or segments (see ``lay_out``). An already
            compressed prompt is returned as it is.
        k: Merge factor: 1 merges nothing, and a server's model may have several; None is its own.
        cached: How many of its first positions a KV cache holds: their blocks are not encoded, and
            it may only be read after them.

    Returns:
        The compressed prompt; its blocks stay bound while the object lives.

    Raises:
        PromptError: Empty, of another type, with a token id outside the vocabulary, for a K that
            there is no encoder for, or compressed for another model.
        BlockTableFullError: Too many blocks in use at once.
    """
    embedding, segments = merged_embedding(model), _segments(tokenizer, prompt)
    if isinstance(segments, CompressedPrompt):
        if segments.table is not (None if embedding is None else embedding.table):
            raise PromptError("the prompt was compressed for another model: compress it for this")
        if not segments.ids:
            raise PromptError("the cache holds all of the prompt: leave its last position to read")
        return segments
    ids = [i for segment in segments for i in segment.ids]
    if not ids:
        raise PromptError("the prompt is empty: there is nothing to read")
    if embedding is not None:
        embedding.check(segments, tokenizer)
        return embedding.compress(segments, k, cached)
    check_ids(ids, table_rows(model), tokenizer)
    return CompressedPrompt(ids, ids, [1] * len(ids))


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    draft_model: nn.Module | None = None,
    **options: Any,
) -> Generator[GenerationResponse, None, None]:
    """Generates text from a prompt whose blocks are merged; the twin of mlx-lm's function.

    Args:
        model: A model from :func:`kmerge_mlx.load`.
        tokenizer: Its tokenizer.
        prompt: See :func:`compress`.
        max_tokens: Most tokens to generate; -1 for no limit.
        logits_processors: mlx-lm's; they are given the original token ids, never virtual ones.
        draft_model: Refused: it would be given virtual ids.
        **options: Everything else of ``mlx_lm.generate.generate_step``: ``sampler``,
            ``max_kv_size``, ``prompt_cache``, ``kv_bits``, ``prefill_step_size`` and so on.

    Yields:
        One response a token.

    Raises:
        ModelError: A draft model was given.
        PromptError: The prompt is empty, or longer than the model's context.
        BlockTableFullError: Too many blocks in use at once.
    """
    if draft_model is not None:
        raise ModelError("a draft model cannot read merged prompts: leave draft_model out")
    if max_tokens == 0:
        raise PromptError("max_tokens is 0: give at least 1, or -1 for no limit")
    start, tokenizer = time.perf_counter(), exact(tokenizer)
    compressed = fitting(model, tokenizer, prompt, options.get("prompt_cache"))
    if logits_processors:
        options["logits_processors"] = over_original_ids(logits_processors, compressed)
    first: float | None = None
    for response in host_stream_generate(
        model, tokenizer, mx.array(compressed.ids), max_tokens=max_tokens, **options
    ):
        first = first or time.perf_counter() - start
        read = len(compressed.original_ids)
        known = vars(response) | {"prompt_tokens": read, "prompt_tps": read / first}
        yield GenerationResponse(
            **known,
            compressed_tokens=len(compressed.ids),
            compression_ratio=compressed.compression_ratio,
            time_to_first_token=first,
        )


def generate(model: nn.Module, tokenizer: Any, prompt: Prompt, **options: Any) -> str:
    """The whole text that :func:`stream_generate` streams, with the same options."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, **options))


class _Batch(BatchGenerator):
    """mlx-lm's generator of a batch, which Ctrl-C may end before it is made."""

    _old_wired_limit = None  # what ``__del__`` reads


def batch_generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    prompt_caches: list[list[Any]] | None = None,
    max_tokens: int | list[int] = 128,
    *,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> BatchResponse:
    """Generates for many prompts at once by mlx-lm's continuous batching, and keeps their order.

    Args:
        model: A model from :func:`kmerge_mlx.load`.
        tokenizer: Its tokenizer.
        prompts: See :func:`compress`, one each.
        prompt_caches: KV caches already filled with a prefix of each prompt; not changed.
        max_tokens: Most tokens to generate, for all or for each.
        logits_processors: mlx-lm's, applied to every prompt over its own original token ids.
        return_prompt_caches: Put each prompt's KV cache in the response.
        return_token_ids: Put the generated ids in the response.
        return_logprobs: Put each generated token's log-probability in the response.
        progress: Called with (finished, total) whenever a prompt is finished.
        **options: Everything else of ``mlx_lm.generate.BatchGenerator``: ``sampler``,
            ``completion_batch_size``, ``prefill_batch_size``, ``max_kv_size`` and so on.

    Raises:
        PromptError: A prompt is empty, or longer than the model's context.
        BlockTableFullError: Too many blocks in use at once.
    """
    tokenizer = exact(tokenizer)
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    compressed = _compress_all(model, tokenizer, prompts, prompt_caches, limits)
    generator = _Batch(model, stop_tokens=[[t] for t in tokenizer.eos_token_ids], **options)
    with contextlib.closing(generator), generator.stats() as stats:
        uids = generator.insert(
            [list(prompt.ids) for prompt in compressed],
            limits,
            caches=prompt_caches,
            logits_processors=[over_original_ids(logits_processors or (), p) for p in compressed],
        )
        rows = _drain(generator, uids, return_logprobs, progress)
    return BatchResponse(
        [tokenizer.detokenizer.decode(row.tokens) for row in rows],
        stats,
        [row.cache for row in rows] if return_prompt_caches else None,
        [row.tokens for row in rows] if return_token_ids else None,
        [row.logprobs for row in rows] if return_logprobs else None,
        [len(prompt.original_ids) for prompt in compressed],
        [len(prompt.ids) for prompt in compressed],
        [row.finish_reason for row in rows],
    )


def fitting(
    model: nn.Module, tokenizer: Any, prompt: Prompt, cache: Sequence[Any] | None = None
) -> CompressedPrompt:
    """A prompt as :func:`compress` makes it, once :func:`check_context` finds that it fits."""
    segments = _segments(tokenizer, prompt)
    check_context(model, segments, cache)
    return compress(model, tokenizer, segments)


def _compress_all(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    prompt_caches: list[list[Any]] | None,
    limits: Sequence[int],
) -> list[CompressedPrompt]:
    """The prompts of a batch, merged if each fits; an error names the one."""
    caches = prompt_caches or [None] * len(prompts)
    if not len(caches) == len(limits) == len(prompts):
        raise PromptError(
            f"{len(prompts)} prompts, {len(caches)} prompt_caches and {len(limits)} max_tokens: "
            "expected one of each for every prompt"
        )
    if min(limits, default=1) < 1:
        raise PromptError(f"max_tokens is {min(limits)}: give at least 1")
    compressed: list[CompressedPrompt] = []
    try:
        for prompt, cache in zip(prompts, caches, strict=True):
            compressed.append(fitting(model, tokenizer, prompt, cache))
    except PromptError as error:
        raise PromptError(f"prompt {len(compressed)}: {error}") from error
    return compressed


def over_original_ids(
    processors: Iterable[LogitsProcessor], prompt: CompressedPrompt
) -> list[LogitsProcessor]:
    """Makes logits processors see the prompt's original token ids instead of virtual ones.

    A virtual id would index the logits out of range, and original ids are what a penalty means.
    """
    original = mx.array(prompt.original_ids)

    def guard(processor: LogitsProcessor) -> LogitsProcessor:
        prompt_size: int | None = None

        def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal prompt_size  # the first call's ids are the prompt's; later ones the answer's
            prompt_size = len(tokens) if prompt_size is None else prompt_size
            answer = tokens[prompt_size:].astype(original.dtype)
            return processor(mx.concatenate([original, answer]), logits)

        return guarded

    return [guard(processor) for processor in processors]


def check_context(
    model: nn.Module,
    prompt: Sequence[Segment] | CompressedPrompt,
    cache: Sequence[Any] | None = None,
    k: int | None = None,
) -> None:
    """Refuses a prompt that has more positions than the model was made for, before any work.

    ``k``: the merge factor at which it will be read; None is the model's.
    """
    limit = getattr(model, "context_length", None)
    if limit is None:
        return
    cached = positions_read(cache)
    if isinstance(prompt, CompressedPrompt):
        tokens, positions = len(prompt.original_ids), len(prompt.ids)
    else:
        embedding = merged_embedding(model)
        if k is None:
            k = 1 if embedding is None else embedding.merge_factor
        tokens, positions = sum(len(s.ids) for s in prompt), sum(s.positions(k) for s in prompt)
    if cached + positions <= limit:
        return
    merged = f" after merging {tokens:,} tokens" if positions < tokens else ""
    remedy = ", or use an adapter with a larger K" if merged else ""
    before = f" on top of {cached:,} in the cache" if cached else ""
    raise PromptError(
        f"the prompt has {positions:,} positions{merged}{before}, and the model's context is "
        f"{limit:,}: shorten it{remedy}"
    )


def positions_read(cache: Sequence[Any] | None) -> int:
    """Positions that a KV cache of mlx-lm has read."""
    return max((int(getattr(layer, "offset", 0)) for layer in cache or ()), default=0)


@dataclass
class _Row:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cache: list[Any] | None = None
    finish_reason: str = "length"


def _drain(
    generator: BatchGenerator,
    uids: list[int],
    want_logprobs: bool,
    progress: Callable[[int, int], None] | None,
) -> list[_Row]:
    """Runs a batch to its end."""
    rows, finished = {uid: _Row() for uid in uids}, 0
    while responses := generator.next_generated():
        for response in responses:
            row = rows[response.uid]
            if response.finish_reason != "stop":
                row.tokens.append(response.token)
                if want_logprobs:
                    row.logprobs.append(response.logprobs[response.token].item())
            if response.finish_reason is not None:
                row.finish_reason, row.cache = response.finish_reason, response.prompt_cache
                finished += 1
                if progress is not None:
                    progress(finished, len(uids))
    return list(rows.values())


def _segments(tokenizer: Any, prompt: Prompt) -> list[Segment] | CompressedPrompt:
    """A prompt as segments of plain ints; a compressed one as it is."""
    if isinstance(prompt, CompressedPrompt):
        return prompt
    try:
        if isinstance(prompt, str):
            special = wants_special_tokens(tokenizer, prompt)
            return segments_of(tokenizer, [Span(prompt)], True, special)
        if isinstance(prompt, Segment):
            prompt = [prompt]
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Segment):
            return [Segment(_ids(part.ids), part.merge) for part in prompt]
        # Bare ids are the model's own, which another tokenizer's encoder cannot read.
        return [Segment(_ids(prompt), merged_text(tokenizer) is None)]
    except (TypeError, AttributeError) as error:  # a lone surrogate in a text, too
        reason = f"{type(prompt).__name__}: {first_line(error)}"
        raise PromptError(f"the prompt is not text, token ids or segments: {reason}") from error


def _ids(values: Any) -> list[int]:
    """The ints that an array of MLX or NumPy, or any sequence but bytes, holds."""
    if isinstance(values, bytes):
        raise TypeError("bytes are not token ids")
    return [index(i) for i in (values.tolist() if hasattr(values, "tolist") else values)]
