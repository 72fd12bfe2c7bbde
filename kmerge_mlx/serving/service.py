"""What the requests of a server share: the model, the limits, the metrics, and the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from threading import Lock
from typing import Any

from mlx_lm.server import (
    LogitsProcessorArguments,
    ModelDescription,
    SamplingArguments,
    get_system_fingerprint,
)
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kmerge_mlx.errors import PromptError
from kmerge_mlx.generation.stream import check_context
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.prompts.lay_out import ALL, lay_out_chat, lay_out_text
from kmerge_mlx.prompts.segments import Segment, encode
from kmerge_mlx.serving.answers import Answer, ApiError, busy, refused
from kmerge_mlx.serving.generator import Arguments, CompressingGenerator, Job, PromptCache
from kmerge_mlx.serving.model import PinnedModel
from kmerge_mlx.serving.requests import COLDEST, ChatCompletion, Completion, read_completion
from kmerge_mlx.serving.settings import ServeSettings, read_api_key
from kmerge_mlx.source import Source

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

# Of each metric that is counted up: its help, and its labels or buckets.
_COUNTED = {
    "requests": ("Requests answered.", ("endpoint", "status")),
    "prompt_tokens": ("Original tokens of prompts.",),
    "compressed_tokens": ("Positions that those tokens took.",),
    "cached_tokens": ("Original tokens that a KV cache held already.",),
    "generated_tokens": ("Tokens generated.",),
    "prompt_cache_lookups": ("Prompts looked up in the KV caches.", ("result",)),
}
_TIMED = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "request_duration_seconds": "From a request's arrival to the end of its answer.",
}
_READ = {
    "requests_in_flight": "Requests admitted and not answered yet.",
    "requests_waiting": "Of those, requests without a first token.",
    "connections": "Open connections.",
    "prompt_cache_sequences": "KV caches kept for prefixes.",
    "prompt_cache_bytes": "Memory of those.",
    "block_slots_in_use": "Slots of the block table that hold a block.",
    "block_slots": "Slots that there are.",
    "ready": "1 while requests are taken.",
}


class Metrics:
    """What a server counts, for Prometheus; names are without their prefix and suffix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "kmerge_mlx", "registry": self.registry}
        self._known = {name: Counter(name, *about, **own) for name, about in _COUNTED.items()}
        self._known |= {n: Histogram(n, h, buckets=SECONDS, **own) for n, h in _TIMED.items()}
        self._known |= {name: Gauge(name, help, **own) for name, help in _READ.items()}

    def count(self, name: str, amount: float = 1, *labels: str) -> None:
        """Counts up."""
        metric = self._known[name]
        (metric.labels(*labels) if labels else metric).inc(amount)

    def observe(self, name: str, seconds: float) -> None:
        """Adds a duration."""
        self._known[name].observe(seconds)

    def read(self, **values: Callable[[], float]) -> None:
        """Says where the values of gauges are read when a client asks for them."""
        for name, value in values.items():
            self._known[name].set_function(value)


class Service:
    """One model and its requests.

    Args:
        settings: The server's settings.

    Raises:
        KMergeError: The key, the model or the adapter cannot be read.
    """

    def __init__(self, settings: ServeSettings):
        self.settings, self.metrics = settings, Metrics()
        self.key = read_api_key(settings.api_key)
        source = Source.find(
            settings.model, settings.adapter_path, settings.k, settings.trust_remote_code
        )
        self.provider = PinnedModel(settings, source)
        self.generator = CompressingGenerator(
            self.provider, lambda result: self.metrics.count("prompt_cache_lookups", 1, result)
        )
        self.provider.loaded.result()
        # Kept: mlx-lm's thread takes the model with it when it ends.
        self.tokenizer = self.provider.tokenizer
        self.draining = False
        self.in_flight = 0
        self._given_up = False
        # Nothing about a fast tokenizer changes after its first text; others are plain Python.
        self.tokenizer.encode(" ")
        fast = getattr(self.tokenizer, "is_fast", False)
        self._tokenizer_lock = nullcontext() if fast else Lock()
        running = settings.decode_concurrency if self.provider.is_batchable else 1
        self._limit = running + settings.max_queue
        self._fingerprint = get_system_fingerprint()
        self._read_gauges()

    def _read_gauges(self) -> None:
        generator, embedding = self.generator, merged_embedding(self.provider.model)
        table = () if embedding is None else embedding.table

        def cached(read: Callable[[PromptCache], int]) -> int:
            cache = getattr(generator, "prompt_cache", None)  # it goes with its thread
            return 0 if cache is None else read(cache)

        self.metrics.read(
            requests_in_flight=lambda: self.in_flight,
            requests_waiting=lambda: (
                self.in_flight - sum(job.generated > 0 for job in list(generator.jobs))
            ),
            prompt_cache_sequences=lambda: cached(len),
            prompt_cache_bytes=lambda: cached(lambda cache: cache.nbytes),
            block_slots_in_use=lambda: len(table),
            block_slots=lambda: getattr(table, "capacity", 0),
            ready=lambda: self.health == "ok",
        )

    @property
    def health(self) -> str:
        """``ok``, ``draining`` or ``unavailable``."""
        if not self.generator.is_healthy:
            return "unavailable"
        return "draining" if self.draining else "ok"

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Counts a request in, and out again.

        Raises:
            ApiError: 429: too many are in; 503: the server is about to end.
        """
        if self.draining:
            raise busy(503, "the server is shutting down", "shutting_down")
        if self.in_flight >= self._limit:
            raise busy(429, "too many requests at once: try again", "queue_full")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def answer(
        self, body: bytes, chat: bool, arrived: float, write: Callable[[str], Awaitable[None]]
    ) -> dict[str, Any] | None:
        """Answers one request.

        Args:
            body: Its body.
            chat: Whether it came to the chat endpoint.
            arrived: When it did, in the event loop's time.
            write: Called with each piece of an answer that is streamed.

        Returns:
            The whole answer, or None if it was streamed.

        Raises:
            ApiError: As an answer.
        """
        seconds = self.settings.request_timeout
        try:
            with self._admitted():
                async with asyncio.timeout_at(arrived + seconds):
                    # Long texts take a while: in another thread, so that others are answered.
                    completion, segments = await asyncio.to_thread(self._read, body, chat)
                    return await self._generate(completion, segments, arrived, write)
        except TimeoutError:
            message = f"the answer took more than {seconds:g} s"
            raise ApiError(504, message, code="timeout") from None

    def _read(self, body: bytes, chat: bool) -> tuple[Completion, list[Segment]]:
        """A checked request, and its prompt laid out."""
        self.generator.check_alive()
        provider, field = self.provider, "messages" if chat else "prompt"
        completion = read_completion(body, chat, provider.name, provider.vocab_size)
        code = None
        try:
            with self._tokenizer_lock:
                segments = self._lay_out(completion)
            tokens, most = sum(len(s.ids) for s in segments), self.settings.max_prompt_tokens
            if not tokens:
                raise PromptError("the prompt is empty: there is nothing to read")
            code = "context_length_exceeded"
            if most is not None and tokens > most:
                raise PromptError(
                    f"the prompt has {tokens:,} tokens, the server takes {most:,}: shorten it"
                )
            check_context(provider.model, segments)
        except PromptError as error:
            raise refused(error.found.replace("`", ""), field, code) from None
        return completion, segments

    def _lay_out(self, completion: Completion) -> list[Segment]:
        layout = self.provider.layout
        if isinstance(completion, ChatCompletion):
            options = self.settings.chat_template_args | completion.template_options()
            return lay_out_chat(self.tokenizer, completion.plain_messages(), layout, options)
        prompt, merge = completion.prompt, completion.merge
        if isinstance(prompt, list):
            # In bare ids, a question looks like a context.
            return [Segment(prompt, layout.merges == ALL if merge is None else merge)]
        if merge is not None:
            return [Segment(encode(self.tokenizer, prompt), merge)]
        return lay_out_text(self.tokenizer, prompt, layout)

    async def _generate(
        self, completion: Completion, segments: list[Segment], arrived: float, write: Any
    ) -> dict[str, Any] | None:
        stream, loop = completion.stream, asyncio.get_running_loop()
        job = Job(segments=segments, chat=completion.chat, loop=loop)
        try:
            self.generator.submit(job, self._arguments(completion))
            if self._given_up:
                raise _shut_down()
            known = {"model": self.provider.name, "system_fingerprint": self._fingerprint}
            answer = Answer(completion, await job.next(), self.tokenizer, known)
            if stream:
                await write("")  # the headers: the prompt was accepted
            while answer.finish_reason is None and (reply := await job.next()) is not None:
                if isinstance(reply, tuple):
                    text = f": keepalive {reply[0]}/{reply[1]}\n\n"
                else:
                    answer.add(reply)
                    text = _event(chunk) if stream and (chunk := answer.chunk()) else ""
                if stream and text:
                    await write(text)
        finally:
            self.generator.forget(job)
            self._count(job, arrived)
        if not stream:
            return answer.whole(job.usage)
        if completion.stream_options.include_usage:
            await write(_event(answer.usage_chunk(job.usage)))
        await write("data: [DONE]\n\n")
        return None

    def _arguments(self, completion: Completion) -> Arguments:
        """A request's settings as mlx-lm takes them."""
        ours = self.settings
        values = {"temperature": ours.temp, "top_p": ours.top_p, "top_k": ours.top_k}
        values |= {"min_p": ours.min_p, "max_tokens": ours.max_tokens, "logit_bias": None}
        values |= {name: value for name, value in completion if value is not None}
        if values["temperature"] < COLDEST:
            values["temperature"] = 0.0
        if biases := values["logit_bias"]:
            values["logit_bias"] = {int(token): bias for token, bias in biases.items()}

        def some(kind: type) -> Any:
            return kind(**{field.name: values[field.name] for field in fields(kind)})

        return Arguments(
            model=ModelDescription(self.provider.name, "default_model", None),
            sampling=some(SamplingArguments),
            logits=some(LogitsProcessorArguments),
            stop_words=completion.stop,
            max_tokens=completion.max_completion_tokens or values["max_tokens"],
            num_draft_tokens=0,
            logprobs=completion.top is not None,
            top_logprobs=completion.top or -1,
            seed=completion.seed,
            chat_template_kwargs=None,
        )

    def _count(self, job: Job, arrived: float) -> None:
        metrics = self.metrics
        metrics.observe("request_duration_seconds", time.monotonic() - arrived)
        if job.first_token_at is not None:
            metrics.observe("time_to_first_token_seconds", job.first_token_at - arrived)
        metrics.count("prompt_tokens", sum(job.lengths))
        metrics.count("compressed_tokens", len(job.lengths))
        metrics.count("cached_tokens", job.cached_tokens)
        metrics.count("generated_tokens", job.generated)

    def drain(self, enough: Callable[[], bool]) -> None:
        """Takes no more requests, and waits for those that are in.

        Args:
            enough: Called while it waits; true ends the waiting.
        """
        self.draining = True
        deadline = time.monotonic() + self.settings.drain_timeout
        while self.in_flight and time.monotonic() < deadline and not enough():
            time.sleep(0.02)

    def close(self) -> None:
        """Gives up the requests that are left, and ends the generation thread."""
        self.draining = self._given_up = True
        self.generator.give_up(_shut_down())
        deadline = time.monotonic() + 5
        while self.in_flight and time.monotonic() < deadline:
            time.sleep(0.01)
        self.generator.stop_and_join()


def _shut_down() -> ApiError:
    return busy(503, "the server has shut down", "shutting_down")


def _event(value: dict[str, Any]) -> str:
    """A piece of a stream."""
    return f"data: {json.dumps(value)}\n\n"
