"""What all of a server's handlers share: the model, the limits, who is in, and whether it drains.

Owns: admission, laying prompts out, and the end. Does not know HTTP.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Condition, Lock

from mlx_lm.server import get_system_fingerprint

from kmerge_mlx.errors import PromptError
from kmerge_mlx.generation.stream import check_context
from kmerge_mlx.prompts.lay_out import lay_out_chat, lay_out_text
from kmerge_mlx.prompts.segments import Segment, encode
from kmerge_mlx.serving.answers import busy, refused
from kmerge_mlx.serving.generator import CompressingGenerator, Job
from kmerge_mlx.serving.metrics import Metrics
from kmerge_mlx.serving.model import PinnedModel
from kmerge_mlx.serving.requests import Completion
from kmerge_mlx.serving.settings import ServeConfig


class Service:
    """One model and everybody who asks it.

    Args:
        config: The server's settings.
        provider: The model; loading begins now.

    Raises:
        KMergeError: The model or the adapter cannot be loaded.
    """

    def __init__(self, config: ServeConfig, provider: PinnedModel):
        self.config = config
        self.metrics = Metrics()
        self.provider = provider
        self.fingerprint = get_system_fingerprint()
        self.generator = CompressingGenerator(provider, self.metrics)
        provider.loaded.result()
        # Kept: mlx-lm's thread takes the model with it when it ends.
        self.tokenizer = provider.tokenizer
        self.model_name = provider.name
        self.vocab_size = provider.vocab_size
        self.draining = False
        self._given_up = False
        self._in_flight = 0
        self._jobs: weakref.WeakValueDictionary[int, Job] = weakref.WeakValueDictionary()
        self._changed = Condition()
        # Nothing about a fast tokenizer changes after its first text; others are plain Python.
        self.tokenizer.encode(" ")
        self._tokenizer_lock = nullcontext() if _is_fast(self.tokenizer) else Lock()
        running = config.decode_concurrency if provider.is_batchable else 1
        self._limit = running + config.max_queue

    @property
    def health(self) -> str:
        """``ok``, ``draining`` or ``unavailable``."""
        if not self.generator.is_healthy:
            return "unavailable"
        return "draining" if self.draining else "ok"

    def metrics_text(self) -> str:
        """Everything counted, as Prometheus reads it."""
        with self._changed:
            jobs = [job for job in self._jobs.values() if not job.cancelled]
        waiting = sum(job.first_token_at is None for job in jobs)
        self.metrics.set("requests_waiting", waiting)
        self.metrics.set("ready", self.health == "ok")
        return self.metrics.text()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request in, and out again.

        Raises:
            ApiError: 429: too many are in; 503: the server is about to end.
        """
        with self._changed:
            if self.draining:
                raise busy(503, "the server is shutting down", "shutting_down")
            if self._in_flight >= self._limit:
                raise busy(429, "too many requests at once: try again", "queue_full")
            self._in_flight += 1
            self.metrics.set("requests_in_flight", self._in_flight)
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self.metrics.set("requests_in_flight", self._in_flight)
                self._changed.notify_all()

    def check(self) -> None:
        """Raises where the server gives a request up before its end.

        Raises:
            ApiError: 503: it had its time to end.
        """
        if self._given_up:
            raise busy(503, "the server has shut down", "shutting_down")

    def job(self, completion: Completion, check: Callable[[], None]) -> Job:
        """Lays a request's prompt out.

        Args:
            completion: The checked request.
            check: See :class:`Job`.

        Raises:
            ApiError: 400: the prompt cannot be laid out, or is too long; 503: no model any more.
        """
        if self.health == "unavailable":
            raise busy(503, "the model has stopped: the server must be restarted", "unavailable")
        field = "prompt" if completion.messages is None else "messages"
        try:
            with self._tokenizer_lock:
                segments = self._lay_out(completion)
        except PromptError as error:
            raise refused(error.found, field) from None
        if not any(segment.ids for segment in segments):
            raise refused("the prompt is empty: there is nothing to read", field)
        most, tokens = self.config.max_prompt_tokens, sum(len(s.ids) for s in segments)
        if most is not None and tokens > most:
            message = f"the prompt has {tokens:,} tokens, the server takes {most:,}: shorten it"
            raise refused(message, field, "context_length_exceeded")
        try:
            check_context(self.provider.model, segments)
        except PromptError as error:
            raise refused(error.found, field, "context_length_exceeded") from None
        job = Job(
            request_type="text" if completion.messages is None else "chat",
            prompt="",
            messages=[],
            tools=completion.options.get("tools"),
            role_mapping=None,
            segments=segments,
            check=check,
        )
        with self._changed:
            self._jobs[id(job)] = job
        return job

    def _lay_out(self, completion: Completion) -> list[Segment]:
        layout, prompt = self.provider.layout, completion.prompt
        if completion.messages is not None:
            fixed = self.config.chat_template_args
            options = {**fixed, **(completion.template_options or {})}
            return lay_out_chat(self.tokenizer, completion.messages, layout, options)
        if isinstance(prompt, list):
            # Nobody can tell a question from a context in bare ids.
            whole = layout.merges == "all" if completion.merge is None else completion.merge
            return [Segment(prompt, whole)]
        if completion.merge is not None:
            return [Segment(encode(self.tokenizer, prompt), completion.merge)]
        return lay_out_text(self.tokenizer, prompt, layout)

    def drain(self) -> None:
        """Takes no more requests, and waits for those that are in, as long as they may take."""
        with self._changed:
            self.draining = True
            deadline = time.monotonic() + self.config.drain_timeout
            while self._in_flight and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.5))

    def close(self) -> None:
        """Gives up what is left, and ends the generation thread."""
        with self._changed:
            self.draining = self._given_up = True
            self._changed.wait_for(lambda: not self._in_flight, timeout=5)
        self.generator.stop_and_join()


def _is_fast(tokenizer: object) -> bool:
    """Whether texts become tokens outside of Python, where several threads can at once."""
    return getattr(tokenizer, "is_fast", False)
