"""What the requests of a server share: the model, the limits, the metrics, and the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

from mlx_lm import server as host
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kmerge_mlx.model import merged_embedding
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.serving.answers import Answer, ApiError, busy, event, head_of
from kmerge_mlx.serving.generator import Arguments, CompressingGenerator, PinnedModel
from kmerge_mlx.serving.jobs import Job, usage_of
from kmerge_mlx.serving.prepare import Preparer
from kmerge_mlx.serving.requests import Completion
from kmerge_mlx.serving.settings import ServeSettings, read_api_key
from kmerge_mlx.source import Source

_log = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

COLDEST = 1e-3
"""A lower temperature is greedy: half precision could not hold the logits."""


class Metrics:
    """What a server counts, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._own = {"namespace": "kmerge_mlx", "registry": self.registry}
        counter = partial(Counter, **self._own)
        self.requests = counter("requests", "Requests answered.", ("endpoint", "status"))
        self.lookups = counter("prompt_cache_lookups", "Prompts looked up in caches.", ("result",))
        self.files = counter("prompt_cache_files", "Prefixes read or written in files.", ("event",))
        self.prompt = counter("prompt_tokens", "Original tokens of prompts.")
        self.compressed = counter("compressed_tokens", "Positions that those tokens took.")
        self.cached = counter("cached_tokens", "Original tokens that a KV cache held already.")
        self.generated = counter("generated_tokens", "Tokens generated.")
        self.expansions = counter("expansions", "Times that the model asked for merged text.")
        timer = partial(Histogram, buckets=SECONDS, **self._own)
        self.first_token = timer("time_to_first_token_seconds", "From arrival to first token.")
        self.duration = timer("request_duration_seconds", "From arrival to the answer's end.")

    def read(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A gauge, whose value is read when a client asks for it."""
        Gauge(name, help, **self._own).set_function(value)


class Service:
    """One model and its requests."""

    def __init__(self, settings: ServeSettings):
        self.settings, self.metrics = settings, Metrics()
        self.key = read_api_key(settings.api_key)
        named = (settings.model, settings.adapter_path, settings.k, settings.trust_remote_code)
        self.provider = PinnedModel(settings, Source.find_set(*named))
        looked_up, filed = self.metrics.lookups.labels, self.metrics.files.labels
        self.generator = CompressingGenerator(
            self.provider, lambda found: looked_up(found).inc(), lambda event: filed(event).inc()
        )
        # Kept: mlx-lm's thread takes the model with it when it ends.
        self.tokenizer = self.provider.own_tokenizer
        self.draining, self.in_flight = False, 0
        running = settings.decode_concurrency if self.provider.is_batchable else 1
        self._limit = running + settings.max_queue
        self.preparer = Preparer(self.provider, self._limit)
        fingerprint = host.get_system_fingerprint()
        self._known = {"system_fingerprint": fingerprint}
        self._read_gauges()

    def _read_gauges(self) -> None:
        generator, read = self.generator, self.metrics.read
        table = getattr(merged_embedding(self.provider.model), "table", ())

        def waiting() -> int:
            return self.in_flight - sum(
                job.first_token_at is not None for job in list(generator.jobs)
            )

        def cache() -> Any:
            return getattr(generator, "prompt_cache", None)  # it goes with its thread

        read("requests_in_flight", "Requests admitted and not answered.", lambda: self.in_flight)
        read("requests_waiting", "Of those, requests without a first token.", waiting)
        read("prompt_cache_sequences", "KV caches of prefixes.", lambda: len(cache() or ()))
        read("prompt_cache_bytes", "Memory of those.", lambda: getattr(cache(), "nbytes", 0))
        read("block_slots_in_use", "Slots that hold a block.", lambda: len(table))
        read("block_slots", "Slots that there are.", lambda: getattr(table, "capacity", 0))
        read("ready", "1 while requests are taken.", lambda: self.health == "ok")

    @property
    def health(self) -> str:
        """``ok``, ``draining`` or ``unavailable``."""
        if not self.generator.is_healthy:
            return "unavailable"
        return "draining" if self.draining else "ok"

    async def answer(
        self,
        pieces: AsyncIterator[bytes],
        chat: bool,
        arrived: float,
        write: Callable[[str], Awaitable[None]],
    ) -> dict[str, Any] | None:
        """Answers a request.

        Args:
            pieces: Its body.
            chat: Whether it is a conversation.
            arrived: When its first byte came, as time.monotonic().
            write: Sends a piece of the answer, if it is to be streamed.

        Returns:
            The whole answer, or None if ``write`` had it.

        Raises:
            ApiError: It is refused, or took too long.
        """
        admitted = 0
        try:
            async with self._in_time(arrived) as deadline:
                async with self.preparer.body(pieces) as body:
                    self._enter()
                    admitted = 1
                    completion, prompts = await self.preparer.prompts(body, chat, deadline)
                del body  # it may be large, and an answer takes long
                self._admit(len(prompts) - 1)
                admitted = len(prompts)
                return await self._generate_all(completion, prompts, arrived, write)
        finally:
            self.in_flight -= admitted

    async def lay_out(
        self, pieces: AsyncIterator[bytes], arrived: float, write: Callable[[str], Awaitable[None]]
    ) -> None:
        """Answers how a request's prompt is read; see :meth:`answer`."""
        # What it holds is let go once the client has its answer, which may be large.
        async with self._in_time(arrived) as deadline, self.preparer.body(pieces) as body:
            self._enter()
            try:
                await write(await self.preparer.layout(body, deadline))
            finally:
                self.in_flight -= 1

    @asynccontextmanager
    async def _in_time(self, arrived: float) -> AsyncIterator[float]:
        """Gives the deadline of a request, and ends with an ApiError what goes on past it."""
        seconds = self.settings.request_timeout
        try:
            async with asyncio.timeout_at(arrived + seconds):
                yield arrived + seconds
        except TimeoutError:
            message = f"the answer took more than {seconds:g} s"
            raise ApiError(504, message, code="timeout") from None

    def _enter(self) -> None:
        if self.draining:
            raise busy(503, "the server is shutting down", "shutting_down")
        self._admit(1)

    def _admit(self, count: int) -> None:
        if self.in_flight + count > self._limit:
            raise busy(429, "too many requests at once: try again", "queue_full")
        self.in_flight += count

    async def _generate_all(
        self, completion: Completion, prompts: list[list[Segment]], arrived: float, write: Any
    ) -> dict[str, Any] | None:
        """The answers to a request's prompts, generated at once."""
        name = self.provider.names[completion.model]
        head, loop = head_of(completion, {"model": name} | self._known), asyncio.get_running_loop()
        k = self.provider.ks[name]
        jobs = [Job(segments, completion.chat, loop, k) for segments in prompts]

        async def send(choice: dict[str, Any]) -> None:
            await write(event(head | {"choices": [choice]}))

        running = [
            asyncio.create_task(self._generate(completion, jobs, index, arrived, write, send))
            for index in range(len(jobs))
        ]
        try:
            answers = await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        usage = usage_of(jobs)
        if self.settings.expand:
            usage["expansions"] = sum(answer.expansions for answer in answers)
        if not completion.stream:
            return head | {"choices": [answer.rest() for answer in answers], "usage": usage}
        if completion.stream_options.include_usage:
            await write(event(head | {"choices": [], "usage": usage}))
        await write("data: [DONE]\n\n")
        return None

    async def _generate(
        self,
        completion: Completion,
        jobs: list[Job],
        index: int,
        arrived: float,
        write: Any,
        send: Any,
    ) -> Answer:
        """One answer, which is sent as it comes if the client asked for a stream.

        If the model asks for merged text, a job with that text takes the place of the one before.
        """
        stream, answer, job = completion.stream, None, jobs[index]
        arguments = self._arguments(completion)
        try:
            while answer is None or answer.expanding:
                if answer is not None:
                    asked = (completion, job.segments, answer.said, answer.asked)
                    completion, segments = await self.preparer.expanded(*asked)
                    jobs[index] = job = job.followed_by(segments)
                    answer.expansions += 1
                    self.metrics.expansions.inc()
                left = arguments.max_tokens - job.earlier
                with self._submitted(job, replace(arguments, max_tokens=left)):
                    context = await job.next()
                    if answer is not None:
                        answer.begin(completion, context)
                    else:
                        answer = Answer(completion, context, self.tokenizer, index)
                        if stream:
                            await write("")  # the headers: the prompt was accepted
                    while not answer.over and (reply := await job.next()) is not None:
                        if not isinstance(reply, tuple):
                            answer.add(reply, job.generated < left)
                            if stream and (chunk := answer.chunk()):
                                await send(chunk)
                        elif stream:
                            await write(f": keepalive {reply[0]}/{reply[1]}\n\n")
        except (ApiError, asyncio.CancelledError):
            if stream and answer is not None:
                answer.let_go()
                if chunk := answer.chunk():
                    await send(chunk)
            raise
        finally:
            self.metrics.duration.observe(time.monotonic() - arrived)
            if job.first_token_at is not None:
                self.metrics.first_token.observe(job.first_token_at - arrived)
        return answer

    @contextmanager
    def _submitted(self, job: Job, arguments: Arguments) -> Iterator[None]:
        """A job that is generated, and forgotten and counted at the end of the block."""
        try:
            self.generator.submit(job, arguments)
            yield
        finally:
            self.generator.forget(job)
            self.metrics.prompt.inc(sum(job.lengths))
            self.metrics.compressed.inc(len(job.lengths))
            self.metrics.cached.inc(job.cached_tokens)
            self.metrics.generated.inc(job.generated)

    def _arguments(self, completion: Completion) -> Arguments:
        """A request's settings as mlx-lm takes them."""
        values = vars(self.settings) | {"temperature": self.settings.temp, "logit_bias": None}
        values |= {name: value for name, value in completion if value is not None}
        if values["temperature"] < COLDEST or completion.top_p == 0:  # which mlx-lm takes for off
            values["temperature"] = 0.0

        def some(kind: type) -> Any:
            return kind(**{field.name: values[field.name] for field in fields(kind)})

        return Arguments(
            model=host.ModelDescription(self.provider.name, "default_model", None),
            sampling=some(host.SamplingArguments),
            logits=some(host.LogitsProcessorArguments),
            stop_words=[stop for stop in completion.stop if self._is_tokens(stop)],
            max_tokens=completion.max_completion_tokens or values["max_tokens"],
            num_draft_tokens=0,
            logprobs=completion.top is not None,
            top_logprobs=completion.top or -1,
            seed=None if completion.seed == -1 else completion.seed,
            chat_template_kwargs=None,
            grammar=completion.grammar,
        )

    def _is_tokens(self, stop: str) -> bool:
        """Whether a stop text's tokens stand for it alone, so that mlx-lm may look for them."""
        tokens = self.tokenizer.encode(stop, add_special_tokens=False)
        return self.tokenizer.decode(tokens) == stop

    def drain(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> int:
        """Takes no more requests, and waits for those that are in, so long or until enough.

        If there is time left, what they leave in memory is written to the folder of prompt caches.

        Returns:
            How many are left.
        """
        self.draining, deadline = True, time.monotonic() + seconds

        def wait(going_on: Callable[[], Any]) -> None:
            while going_on() and time.monotonic() < deadline and not enough():
                time.sleep(0.02)

        wait(lambda: self.in_flight)
        if self.generator.folder is not None:
            wait(self.generator.folder.flushing())
        return self.in_flight

    def close(self) -> None:
        """Gives up the requests that are left, and ends the generation thread."""
        self.generator.give_up(busy(503, "the server has shut down", "shutting_down"))
        self.drain(5, lambda: not self.in_flight)
        self.generator.stop_and_join()
