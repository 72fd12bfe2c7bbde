"""The server's model, and all that we override of mlx-lm's engine so that it reads merged prompts.

MLX works in mlx-lm's generation thread alone. Blocks are freed there too, and only while a prompt
is merged.
"""

from __future__ import annotations

import copy
import gc
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server as host
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import LRUPromptCache, PromptTrie, make_prompt_cache
from mlx_lm.tokenizer_utils import StreamingDetokenizer

from kmerge_mlx.base import find_embedding
from kmerge_mlx.errors import BlockTableFullError, ServeError, one_line_refusals
from kmerge_mlx.generation.cost import kv_bytes_from
from kmerge_mlx.generation.stream import compress, over_original_ids
from kmerge_mlx.generation.structured import Follow, Grammar
from kmerge_mlx.model import load_source, merged_embedding
from kmerge_mlx.prompts.chat_template import needs_template
from kmerge_mlx.prompts.keep import check_keep
from kmerge_mlx.prompts.policy import chosen
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.serving.answers import ApiError, ClientGone, busy, unfollowed
from kmerge_mlx.serving.cache_folder import CacheFolder, Held
from kmerge_mlx.serving.expand import check_expand
from kmerge_mlx.serving.jobs import Job
from kmerge_mlx.serving.prefixes import PromptCache, stand_for
from kmerge_mlx.serving.requests import DEFAULT_MODEL
from kmerge_mlx.serving.settings import ServeSettings
from kmerge_mlx.settings import MAX_INT
from kmerge_mlx.source import Source
from kmerge_mlx.virtual_tokens import CompressedPrompt

MOST_FAILURES = 3
"""Failures of mlx-lm's loop, one after the other without an answer, that end the server."""

_log = logging.getLogger(__name__)
_host_processors = host._make_logits_processors

# What is overridden or called of mlx-lm's own, with its parameters.
_SEAM = {
    (host, "_make_logits_processors"): "args",
    (host.ResponseGenerator, "_run_generate"): "self",
    (host.ResponseGenerator, "_next_request"): "self, timeout",
    (host.ResponseGenerator, "_is_batchable"): "self, args",
    (host.ResponseGenerator, "_tokenize"): "self, tokenizer, request, args",
    (LRUPromptCache, "fetch_nearest_cache"): "self, model, tokens",
    (LRUPromptCache, "insert_cache"): "self, model, tokens, prompt_cache, cache_type",
    (PromptTrie, "get"): "self, model, tokens",
    (host.ModelProvider, "load"): "self, model_path, adapter_path, draft_model_path",
}


def check_seam() -> None:
    """Checks that mlx-lm still has what this module overrides."""
    for (owner, name), expected in _SEAM.items():
        found = ", ".join(signature(getattr(owner, name, lambda: None)).parameters)
        if found != expected:
            raise ServeError(
                f"mlx-lm {version('mlx-lm')} does not fit this release: {owner.__name__}.{name} "
                f"takes ({found}), expected ({expected}): install the mlx-lm of pyproject.toml"
            )


class _Textless(StreamingDetokenizer):
    """Makes no text in mlx-lm's thread: an Answer makes it, where no token can end the thread."""

    text = ""
    offset = 0

    def reset(self) -> None:
        pass

    def add_token(self, token: int) -> None:
        pass

    def finalize(self) -> None:
        pass


class PinnedModel(host.ModelProvider):
    """mlx-lm's model provider with one model, which no client can change."""

    def __init__(self, settings: ServeSettings, sources: Sequence[Source]):
        # Where there are several, that of the smallest K that merges: it loses least.
        source = next((one for one in sources if one.k > 1), sources[0])
        own = {"prompt_cache_bytes": settings.cache_limit, "draft_model": None, "pipeline": False}
        super().__init__(Namespace(**vars(settings) | own))
        self.settings, self.source, self.several = settings, source, sources[1:] and sources
        folder = Path(source.model)
        self.name = source.model
        if folder.is_dir():  # by its own name, where it is a link too
            self.name = (folder.resolve() if folder.name in ("", "..") else folder).name
        suffixes = {"": source.k} | {f":k{one.k}": one.k for one in self.several}
        # The K of each name that is listed, and for each that clients may use the one that says K.
        self.ks = {f"{self.name}{suffix}": k for suffix, k in suffixes.items()}
        called, own = (self.name, DEFAULT_MODEL, source.model), f":k{source.k}"
        told = {s: f"{self.name}{s or own * bool(self.several)}" for s in suffixes}
        self.names = {f"{n}{s}": name for s, name in told.items() for n in called}
        self.stored_layout = None if source.merge is None else source.merge.layout
        self.layout = chosen(
            self.stored_layout,
            settings.merges,
            settings.merge_threshold,
            settings.chat_template,
            settings.keep,
        )

    def load(self, *named: Any) -> tuple[Any, Any]:
        """The model and its tokenizer, whatever name mlx-lm asks for."""
        return self.model, self.tokenizer

    def load_once(self) -> None:
        """Loads the model, in mlx-lm's generation thread."""
        settings = self.settings
        more = {"max_blocks": settings.max_blocks, "several": self.several}
        model, tokenizer, _ = load_source(self.source, **more)
        needs_template(tokenizer, settings.chat_template)
        check_keep(tokenizer, self.layout.keep)
        has_template = self.layout.chat_template and tokenizer.has_chat_template
        if settings.chat_template_args and not has_template:
            raise ServeError("`chat_template_args` needs a chat template, and none is applied")
        if settings.expand:
            check_expand(tokenizer, self.layout, self.source.k)
        embedding = merged_embedding(model) or find_embedding(model, self.name)[1]
        self.vocab_size = embedding.weight.shape[0]
        if settings.top_k >= self.vocab_size:
            raise ServeError(
                f"`top_k` is {settings.top_k}, and the vocabulary has {self.vocab_size:,} tokens: "
                "give fewer"
            )
        caches = make_prompt_cache(model)
        self.is_batchable = all(hasattr(cache, "merge") for cache in caches)
        mx.eval(model(mx.array([[0]]), cache=caches))
        plain = quantized = kv_bytes_from(caches)
        if settings.kv_bits is not None:  # now, so that a request is not the first to fail
            with one_line_refusals():
                maybe_quantize_kv_cache(caches, 0, settings.kv_group_size, settings.kv_bits)
            quantized = kv_bytes_from(caches)
        start = settings.quantized_kv_start
        self.kv_bytes_at = lambda count: (quantized if count >= start else plain)(count)
        self.model, self.own_tokenizer = model, tokenizer
        self.tokenizer = copy.copy(tokenizer)  # mlx-lm's
        self.tokenizer._detokenizer = _Textless()
        self.model_key = (self.name, None, None)


@dataclass(kw_only=True)
class Arguments(host.GenerationArguments):
    """mlx-lm's arguments of a request; they carry to the logits processors what these need.

    Args:
        prompt: The merged prompt.
        grammar: The compiled schema of the answer.
        follow: The logits processor that makes the answer fit it.
    """

    prompt: CompressedPrompt | None = None
    grammar: Grammar | None = None
    follow: Follow | None = None


def _processors(args: Arguments) -> list[Any]:
    """mlx-lm's logits processors, which see a prompt's original ids, never virtual ones."""
    ours = [] if args.follow is None else [args.follow]
    return over_original_ids(_host_processors(args), args.prompt) + ours


class CompressingGenerator(host.ResponseGenerator):
    """mlx-lm's response generator, whose prompts are merged; its thread loads the model first."""

    def __init__(
        self,
        provider: PinnedModel,
        looked_up: Callable[[str], None],
        filed: Callable[[str], None],
    ):
        check_seam()
        settings = provider.settings
        host._make_logits_processors = _processors
        self.jobs: set[Job] = set()
        self._held: dict[Job, CompressedPrompt] = {}
        self._loaded: Future[None] = Future()
        self._over: Exception | None = None  # why no job is taken any more
        self._failures = 0  # of mlx-lm's loop, since an answer came to its end
        self.folder = None if settings.prompt_cache_dir is None else CacheFolder(settings, filed)
        limits = settings.prompt_cache_size, settings.cache_limit
        cache = PromptCache(*limits, looked_up, self.folder, self._stand_for)
        super().__init__(provider, cache)
        self._loaded.result()

    def submit(self, job: Job, args: Arguments) -> None:
        """Queues a job; it is to be forgotten afterwards."""
        self.jobs.add(job)  # before the check: whoever is in when it ends is told
        if self._over is not None:
            raise self._over.with_traceback(None)
        job.alone = not self._is_batchable(args)
        self.requests.put((job, job, args))

    def forget(self, job: Job) -> None:
        """Stops a job, wherever it is."""
        if job.generated and not job.failed:
            self._failures = 0
        job.cancelled = True
        self.jobs.discard(job)

    def give_up(self, error: Exception) -> None:
        """Ends every job with an error, those to come too."""
        self._over = error
        for job in list(self.jobs):
            job.tell(error)

    def _run_generate(self) -> None:
        provider = self.model_provider
        try:
            provider.load_once()
            if (embedding := merged_embedding(provider.model)) is not None:
                embedding.table.cached_ids = self.prompt_cache.cached_ids
            if self.folder is not None:
                self.folder.open(provider.model, provider.several or [provider.source])
            self._loaded.set_result(None)
            while not self._stop:
                self._generate_until_it_fails()
        except BaseException as error:
            self._generation_failed = True
            if self._loaded.done():
                _log.exception("the generation thread died")
            else:
                self._loaded.set_exception(error)
            message = "the model has stopped: the server must be restarted"
            self.give_up(busy(503, message, "unavailable"))
            # As at its proper end: what MLX made here must go here.
            provider.reset()
            self.prompt_cache = None
            gc.collect()
        finally:  # else MLX aborts a process that ends as its thread does
            if self.folder is not None:
                self.folder.close()
            mx.clear_streams()

    def _generate_until_it_fails(self) -> None:
        """mlx-lm's loop, which ends with the server or with an error; the requests then end too."""
        try:
            self._generate()
            return
        except Exception:
            self._failures += 1
            if not self.jobs or self._failures == MOST_FAILURES:  # it would only happen again
                raise
            _log.exception("generation failed, and begins anew")
            self.prompt_cache.trim_to(n_sequences=0)
            message = "generation failed and has begun anew: try again"
            for job in list(self.jobs):
                job.put(busy(503, message, "generation_failed"))
        gc.collect()  # what the failed batch held; mlx-lm does so itself at a proper end

    def _next_request(self, timeout: float | None = None) -> Any:
        if self.folder is not None:
            self.folder.step()
        return super()._next_request(timeout)

    def _stand_for(self, ids: Sequence[int]) -> Held | None:
        in_work = [(Held(job.segments, job.k), prompt.ids) for job, prompt in self._held.items()]
        return stand_for(ids, in_work, self.model_provider.vocab_size)

    def _tokenize(self, tokenizer: Any, request: Job, args: Arguments) -> Any:
        """Merges a prompt that is laid out already; see mlx-lm's for the result."""
        if request.cancelled:
            raise ClientGone("cancelled before its turn")
        self._held = {job: prompt for job, prompt in self._held.items() if not job.over}
        prompt = self._compress(tokenizer, request.segments, request.k)
        self._held[request] = args.prompt = prompt
        request.lengths, k = prompt.lengths, request.k
        if k > 1:  # else, what is laid out to merge is read one by one
            request.merged_tokens = sum(len(s.ids) for s in request.segments if s.merge)
        limit = getattr(self.model_provider.model, "context_length", None)
        if limit is not None:
            args.max_tokens = min(args.max_tokens, max(1, limit - len(prompt.ids)))
        # Other prompts are likely to share what there is up to the last merged run.
        segments, ids, state = request.segments, list(prompt.ids), "normal"
        shared = max((i + 1 for i, segment in enumerate(segments) if segment.merge), default=0)
        end = sum(s.positions(k) for s in segments[:shared])
        parts = [part for part in (ids[:end], ids[end:]) if part]
        if request.chat:  # an answer may begin in the middle of thinking
            read = prompt.original_ids
            if tokenizer.has_thinking and (
                tokenizer.rfind_think_start(read) > tokenizer.rfind_think_end(read)
            ):
                state = "reasoning"
            state = tokenizer.response_initial_state or state
        if args.grammar is not None:
            after = tokenizer.think_end_tokens if state == "reasoning" else ()
            args.follow = Follow(args.grammar, lambda e: request.tell(unfollowed(e)), after)
        return ids, parts, ["user", "assistant"][-len(parts) :], state, None

    def _compress(self, tokenizer: Any, segments: list[Segment], k: int) -> CompressedPrompt:
        # With a folder, nothing is encoded until it is known what is left to read.
        model, cached = self.model_provider.model, 0 if self.folder is None else MAX_INT
        try:
            return compress(model, tokenizer, segments, k, cached)
        except BlockTableFullError:
            embedding = merged_embedding(model)
            blocks = {block for s in segments if s.merge for block in embedding.keys(s.ids, k)}
            if len(blocks) > embedding.table.capacity:
                raise ApiError(
                    400,
                    f"the prompt has {len(blocks):,} distinct blocks, more than the server's "
                    f"{embedding.table.capacity:,} slots: shorten it",
                    code="context_length_exceeded",
                ) from None
            self.prompt_cache.trim_to(n_sequences=0)
            return compress(model, tokenizer, segments, k, cached)

    def _log_cache_stats(self) -> None:
        """Nothing: /metrics has it."""
