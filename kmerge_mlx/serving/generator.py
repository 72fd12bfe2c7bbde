"""mlx-lm's response generator over merged prompts.

Owns: when a prompt is merged and for how long its blocks stay bound, logits processors over
original ids, and how an answer is waited for and given up. Batching, caching and decoding are
mlx-lm's.

MLX works in the generation thread alone. Blocks are freed there too, and only when a prompt is
merged, so a prompt may be let go of at any point before the next one: the KV cache that is then
kept names its blocks by itself.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, Queue
from types import FunctionType
from typing import Any

from mlx_lm import server as host
from mlx_lm.generate import BatchGenerator
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
    ResponseGenerator,
)

from kmerge_mlx.errors import BlockTableFullError
from kmerge_mlx.generation.stream import compress, over_original_ids
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.serving.answers import ClientGone, busy, refused
from kmerge_mlx.serving.caches import PromptCache
from kmerge_mlx.serving.metrics import Metrics
from kmerge_mlx.serving.model import PinnedModel
from kmerge_mlx.serving.stops import cut_at_stops
from kmerge_mlx.virtual_tokens import CompressedPrompt, split

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2


@dataclass(kw_only=True)
class Job(CompletionRequest):
    """A request on its way through the generator.

    Args:
        segments: Its prompt, laid out.
        check: Called while it waits; raises when its answer is no longer wanted.
        context: mlx-lm's, once it is being answered.
        cancelled: Whether to stop.
        lengths: How many original tokens each position of the merged prompt stands for.
        generated: Tokens of its answer so far.
        first_token_at: ``time.monotonic()`` of the first, or None.
        unsaid: Those whose log-probabilities the client was not told yet.
    """

    segments: list[Segment]
    check: Callable[[], None]
    context: GenerationContext | None = None
    cancelled: bool = False
    lengths: list[int] = field(default_factory=list)
    generated: int = 0
    first_token_at: float | None = None
    unsaid: list[Response] = field(default_factory=list)

    def count(self, response: Response) -> None:
        """Counts a token; a piece of text that is none has a number below 0."""
        self.first_token_at = self.first_token_at or time.monotonic()
        if response.token >= 0:
            self.generated += 1
            self.unsaid.append(response)

    def cancel(self) -> None:
        """Stops it, wherever it is."""
        self.cancelled = True
        if self.context is not None:
            self.context.stop()

    @property
    def cached_tokens(self) -> int:
        """How many original tokens a KV cache held already."""
        positions = self.context.prompt_cache_count if self.context else 0
        return sum(self.lengths[: max(positions, 0)])


class _Replies(Queue):
    """What the generation thread says of one job."""

    def __init__(self, job: Job):
        super().__init__()
        self._job = job
        self.alone = False

    def put(self, item: Any, *args: Any, **options: Any) -> None:
        # Served alone, a prompt is read to its end before mlx-lm looks up: progress is the chance.
        if self.alone and self._job.cancelled and isinstance(item, tuple):
            raise ClientGone("cancelled while its prompt was read")
        super().put(item, *args, **options)


class _Batch(BatchGenerator):
    """mlx-lm's batch; what is in it keeps its blocks."""

    def __init__(self, arriving: Callable[[], CompressedPrompt], *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._arriving = arriving
        self._held: dict[int, CompressedPrompt] = {}

    def insert_segments(self, *args: Any, **options: Any) -> list[int]:
        uids = super().insert_segments(*args, **options)
        self._held.update(dict.fromkeys(uids, self._arriving()))
        return uids

    def remove(self, uids: list[int], *args: Any, **options: Any) -> Any:
        removed = super().remove(uids, *args, **options)
        for uid in uids:
            self._held.pop(uid, None)
        return removed

    def next(self) -> Any:
        prompts, answers = super().next()
        for answer in answers:
            if answer.finish_reason is not None:
                self._held.pop(answer.uid, None)
        return prompts, answers


class CompressingGenerator(ResponseGenerator):
    """mlx-lm's response generator, whose prompts are merged.

    Args:
        provider: The model.
        metrics: What is counted.
    """

    def __init__(self, provider: PinnedModel, metrics: Metrics):
        config = provider.config
        self.metrics = metrics
        self._arriving: CompressedPrompt | None = None
        cache = PromptCache(config.prompt_cache_size, config.prompt_cache_bytes, metrics)
        super().__init__(provider, cache)

    def generate(
        self,
        request: Job,
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """Queues a job and waits for its turn.

        Args:
            request: The job.
            generation_args: mlx-lm's.
            progress_callback: Called with (positions read, positions in all).

        Returns:
            mlx-lm's context, and the tokens as they come.

        Raises:
            ApiError: 503: there is no generation thread any more.
            Exception: What :attr:`Job.check` or the generation thread raised.
        """
        replies = _Replies(request)
        self._check_alive()
        self.requests.put((replies, request, generation_args))

        def tokens() -> Iterator[Response]:
            while (reply := self._reply(replies, request)) is not None:
                if not isinstance(reply, tuple):
                    yield reply
                elif progress_callback is not None:
                    progress_callback(*reply)

        def counted() -> Iterator[Response]:
            for response in cut_at_stops(tokens(), generation_args.stop_words):
                request.count(response)
                yield response

        try:
            context = self._reply(replies, request)
        except BaseException:
            request.cancel()
            raise
        return context, counted()

    def _reply(self, replies: _Replies, job: Job) -> Any:
        """The next thing said of a job; what is raised there is raised here."""
        while True:
            job.check()
            try:
                reply = replies.get(timeout=_POLL_SECONDS)
            except Empty:
                self._check_alive()
                continue
            if isinstance(reply, Exception):
                raise reply
            return reply

    def _check_alive(self) -> None:
        if not self.generation_available():
            raise busy(503, "the model has stopped: the server must be restarted", "unavailable")

    def _run_generate(self) -> None:
        try:
            self._generate()
        except Exception:
            _log.exception("the generation thread died")
            self._generation_failed = True
        # As at its proper end: what MLX made here must go here.
        self.model_provider.reset()
        self.prompt_cache = None
        gc.collect()

    def _generate(self) -> None:
        self.model_provider.load_once()
        if self.model_provider.loaded.exception() is not None:
            return  # whoever waits for it says why
        if (embedding := merged_embedding(self.model_provider.model)) is not None:
            embedding.table.protect(self.prompt_cache.cached_ids)
            self.metrics.set("block_slots", embedding.table.capacity)
        del embedding  # the last reference must go where MLX worked
        batch = partial(_Batch, lambda: self._arriving)
        run = _rebound(ResponseGenerator._generate, BatchGenerator=batch, **self._own_names())
        run(self)
        self._arriving = None

    def _serve_single(self, request: tuple[_Replies, Job, Any], stream: Any) -> None:
        request[0].alone = True
        _rebound(ResponseGenerator._serve_single, **self._own_names())(self, request, stream)

    def _own_names(self) -> dict[str, Any]:
        return {
            "_make_logits_processors": self._processors,
            "GenerationContext": self._context,
        }

    def _processors(self, args: GenerationArguments) -> list[Any]:
        """mlx-lm's logits processors: they must never see a virtual id."""
        return over_original_ids(host._make_logits_processors(args), self._arriving)

    def _context(self, **known: Any) -> GenerationContext:
        """mlx-lm's context, which a job that was given up meanwhile stops at once."""
        job, context = self._job, GenerationContext(**known)
        job.context = context
        if job.cancelled:
            context.stop()
        return context

    def _tokenize(self, tokenizer: Any, request: Job, args: GenerationArguments) -> Any:
        """Merges a prompt that was laid out when it came in; see mlx-lm's for what it returns."""
        self._arriving, self._job = None, request
        if request.cancelled:
            raise ClientGone("cancelled before its turn")
        prompt = self._arriving = self._compress(tokenizer, request.segments)
        request.lengths = prompt.lengths
        limit = getattr(self.model_provider.model, "context_length", None)
        if limit is not None:
            args.max_tokens = min(args.max_tokens, max(1, limit - len(prompt.ids)))
        shared = _shared_end(request.segments, self.model_provider.merge_factor)
        ids, parts, kinds = list(prompt.ids), [list(prompt.ids)], ["assistant"]
        if 0 < shared < len(ids):
            parts, kinds = [ids[:shared], ids[shared:]], ["user", "assistant"]
        state = self._initial_state(tokenizer, request, prompt.original_ids)
        return ids, parts, kinds, state, None

    def _compress(self, tokenizer: Any, segments: list[Segment]) -> CompressedPrompt:
        model = self.model_provider.model
        try:
            return compress(model, tokenizer, segments)
        except BlockTableFullError:
            embedding = merged_embedding(model)
            cut = (embedding.merge_factor, embedding.pad_token_id, embedding.context)
            blocks = {block for s in segments if s.merge for block in split(s.ids, *cut)}
            if len(blocks) > embedding.table.capacity:
                raise refused(
                    f"the prompt has {len(blocks):,} distinct blocks, more than the server's "
                    f"{embedding.table.capacity:,} slots: shorten it",
                    code="context_length_exceeded",
                ) from None
            self.prompt_cache.clear()
            return compress(model, tokenizer, segments)
        finally:
            if (embedding := merged_embedding(model)) is not None:
                self.metrics.set("block_slots_in_use", len(embedding.table))

    def _initial_state(self, tokenizer: Any, job: Job, ids: list[int]) -> str:
        """Whether an answer begins in the middle of thinking, as mlx-lm finds it."""
        if job.request_type != "chat":
            return "normal"
        state = "normal"
        if tokenizer.has_thinking and (
            tokenizer.rfind_think_start(ids) > tokenizer.rfind_think_end(ids)
        ):
            state = "reasoning"
        return tokenizer.response_initial_state or state

    def _log_cache_stats(self) -> None:
        self.prompt_cache.report()


def _shared_end(segments: list[Segment], merge_factor: int) -> int:
    """Positions up to the end of the last merged run: what other prompts are likely to share."""
    positions = end = 0
    for segment in segments:
        positions += -(-len(segment.ids) // (merge_factor if segment.merge else 1))
        end = positions if segment.merge else end
    return end


def _rebound(method: FunctionType, **names: Any) -> Callable[..., Any]:
    """A method of mlx-lm's that finds our things under some of its module's names.

    mlx-lm calls these by name and has no hook for them. Its module stays as it is: others in this
    process may use it.
    """
    if missing := names.keys() - set(method.__code__.co_names):
        raise ImportError(f"mlx-lm's {method.__qualname__} no longer uses {sorted(missing)}")
    return FunctionType(
        method.__code__,
        method.__globals__ | names,
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
