"""From a request's body to prompts laid out, within bounds of memory and time.

What a client sends is bounded before the work that it makes: bytes before they are read as JSON,
and characters before they are tokenized.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from threading import Lock, Thread
from typing import Any

from kmerge_mlx.errors import PromptError
from kmerge_mlx.generation.stream import check_context
from kmerge_mlx.generation.structured import Grammar, Schemas
from kmerge_mlx.prompts.lay_out import ALL, lay_out_chat, lay_out_spans, lay_out_text
from kmerge_mlx.prompts.segments import Segment, merged_text
from kmerge_mlx.prompts.tags import Span
from kmerge_mlx.serving.answers import ApiError, body_too_large, busy, unfollowed
from kmerge_mlx.serving.dates import Dates
from kmerge_mlx.serving.expand import MOST_ROUNDS, MOST_TOKENS, NAME, messages_of, numbered
from kmerge_mlx.serving.generator import PinnedModel
from kmerge_mlx.serving.layout import Layouts
from kmerge_mlx.serving.requests import ChatCompletion, Completion, read_completion

MOST_BODIES = 4
"""Largest bodies that may be in memory at once, or as many bytes of smaller ones."""

MOST_PREPARED = 2
"""Requests that are read as JSON and tokenized at once: each may take a gigabyte."""

MOST_CHARACTERS = 32
"""Of each token that a prompt may have: words take 4 to 6, and a longer prompt is not tokenized."""

_log = logging.getLogger(__name__)


class Preparer:
    """Reads and tokenizes the requests of a server.

    Args:
        provider: The model, its tokenizer, and the settings.
        most_prompts: Prompts that a request may have.
    """

    def __init__(self, provider: PinnedModel, most_prompts: int):
        self.provider, self.settings = provider, provider.settings
        # Kept: mlx-lm's thread takes the model with it when it ends.
        self.tokenizer, self._model = provider.own_tokenizer, provider.model
        self._most_prompts, self._body_bytes = most_prompts, 0
        self._places = asyncio.Semaphore(MOST_PREPARED)
        self._noted: set[str] = set()
        self._dates = Dates(self.tokenizer)
        self._layouts = Layouts(self.tokenizer, provider.kv_bytes_at)
        self._schemas = Schemas(self.tokenizer)
        with suppress(ImportError, PromptError):  # a request with a schema is told
            self._schemas.read_vocabulary()
        # Nothing about a fast tokenizer changes after its first text; others are plain Python.
        self.tokenizer.encode(" ")
        fast = getattr(self.tokenizer, "is_fast", False)
        self._tokenizer_lock = nullcontext() if fast else Lock()

    async def prompts(
        self, body: bytearray, chat: bool, deadline: float
    ) -> tuple[Completion, list[list[Segment]]]:
        """A checked request, and its prompts laid out; read in a thread, a few at a time.

        Args:
            body: As :meth:`body` gives it.
            chat: Whether it is a conversation.
            deadline: When nobody waits any more, as time.monotonic().

        Raises:
            ApiError: It is refused.
            TimeoutError: The deadline has passed.
        """
        return await self._aside(partial(self._read, body, chat, deadline))

    async def layout(self, body: bytearray, deadline: float) -> str:
        """The JSON of how a request's prompt is read; see :meth:`prompts`."""
        return await self._aside(partial(self._described, body, deadline))

    async def expanded(self, *asked: Any) -> tuple[ChatCompletion, list[Segment]]:
        """The next round of an answer, whose model asked for text: see :meth:`_expand`."""
        return await self._aside(partial(self._expand, *asked))

    @asynccontextmanager
    async def body(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytearray]:
        """A whole body from its pieces; its bytes count until the end of the block."""
        body, most = bytearray(), self.settings.max_body_bytes
        try:
            async for piece in pieces:
                body += piece
                self._body_bytes += len(piece)
                if len(body) > most:
                    raise body_too_large(most)
                if self._body_bytes > MOST_BODIES * most:
                    raise busy(429, "too many large requests at once: try again", "queue_full")
            yield body
        finally:
            self._body_bytes -= len(body)

    async def _aside(self, work: Callable[[], Any]) -> Any:
        """What a function returns that works in a thread beside this one, a few at a time.

        It cannot be ended: if nobody waits for it any more, it keeps its place until it is done.
        """
        await self._places.acquire()
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        here = asyncio.wrap_future(done)
        here.add_done_callback(lambda _: self._places.release())
        # If nobody waits any more, asyncio would log its error as one that was overlooked.
        here.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Not one of a pool: Python waits for those before it ends.
        Thread(target=run, name="prepare", daemon=True).start()
        return await asyncio.shield(here)

    def _read(
        self, body: bytearray, chat: bool | None, deadline: float
    ) -> tuple[Completion, list[list[Segment]]]:
        """A checked request, and its prompts laid out."""
        provider = self.provider
        completion = read_completion(bytes(body), chat, provider.names, provider.vocab_size)
        chat = completion.chat
        if (schema := completion.answer_schema) is not None:
            completion.grammar = self._compiled(schema, chat)
        k = self._k(completion)
        if chat:
            self._check_length(completion.written, "messages", k)
            completion, segments = self._read_chat(completion)
            return completion, [segments]
        count = len(completion.prompt)
        if count > self._most_prompts:
            message = f"prompt has {count} prompts, the server takes {self._most_prompts} at once"
            raise ApiError(400, message, "prompt")
        prompts = []
        for prompt in completion.prompt:
            if time.monotonic() > deadline:
                raise TimeoutError
            self._check_length(prompt, "prompt", k)
            lay_out = partial(self._lay_out, prompt, completion.merge)
            prompts.append(self._fitting(lay_out, "prompt", k))
        return completion, prompts

    def _described(self, body: bytearray, deadline: float) -> str:
        completion, prompts = self._read(body, None, deadline)
        if len(prompts) > 1:
            message = f"prompt has {len(prompts)} prompts, expected one: a layout is of one"
            raise ApiError(400, message, "prompt")
        with self._tokenizer_lock:
            made = self._layouts.describe(prompts[0], self._k(completion))
        known = {"object": "prompt.layout", "model": self.provider.names[completion.model]}
        return json.dumps(known | made)

    def _read_chat(self, completion: ChatCompletion) -> tuple[ChatCompletion, list[Segment]]:
        """A conversation laid out; with ``expand``, if it is to be offered and something merges."""
        k = self._k(completion)
        if self.settings.expand and completion.merge is None and k > 1:
            functions = [tool.get("function", tool) for tool in completion.tools]
            if any(isinstance(f, dict) and f.get("name") == NAME for f in functions):
                message = f"tools has a function {NAME}, which is the server's own: rename it"
                raise ApiError(400, message, "tools")
            if completion.tool_choice == "auto" and completion.answer_schema is None:
                asked = completion.expanding(MOST_ROUNDS)
                segments = self._fitting(lambda: self._lay_out_chat(asked), "messages", k)
                if any(segment.merge for segment in segments):
                    return asked, segments
        return completion, self._fitting(lambda: self._lay_out_chat(completion), "messages", k)

    def _expand(
        self,
        completion: ChatCompletion,
        segments: list[Segment],
        said: Mapping[str, str],
        calls: Sequence[Mapping[str, Any]],
    ) -> tuple[ChatCompletion, list[Segment]]:
        """The conversation with what the model asked for, laid out."""
        tokens, k = sum(len(s.ids) for s in segments), self._k(completion)
        positions = sum(s.positions(k) for s in segments)
        limits = (self.settings.max_prompt_tokens, tokens), (self._model.context_length, positions)
        # Half of what is left: there may be more rounds, and an answer is to come.
        room = [max(0, most - taken) // 2 for most, taken in limits if most is not None]
        with self._tokenizer_lock:
            most = min([MOST_TOKENS, *room])
            added = messages_of(self.tokenizer, self._whole(completion), said, calls, most)
        asked = completion.expanding(completion.rounds - 1, *added)
        return asked, self._fitting(lambda: self._lay_out_chat(asked), "messages", k)

    def _k(self, completion: Completion) -> int:
        """The merge factor that a request's model has."""
        return self.provider.ks[self.provider.names[completion.model]]

    def _compiled(self, schema: dict[str, Any], chat: bool) -> Grammar:
        """The grammar of a schema that an answer can follow."""
        if chat and self.tokenizer.response_initial_state:
            message = "response_format: this model's answers have a form of their own"
            raise ApiError(400, message, "response_format")
        try:
            return self._schemas.compile(schema)
        except PromptError as error:
            raise unfollowed(error) from None

    def _check_length(self, prompt: str | list[int], field: str, k: int) -> None:
        """Refuses a text that is too long to fit, before it is tokenized."""
        context = self._model.context_length
        most = [self.settings.max_prompt_tokens, context and context * k]
        tokens = min(filter(None, most), default=None)
        if isinstance(prompt, str) and tokens and len(prompt) > MOST_CHARACTERS * tokens:
            found = (
                f"the prompt has {len(prompt):,} characters, more than {MOST_CHARACTERS} for each "
                "of those: shorten it"
            )
            raise _too_long(tokens, found, field)

    def _fitting(self, lay_out: Callable[[], list[Segment]], field: str, k: int) -> list[Segment]:
        """A prompt laid out, if it fits."""
        try:
            with self._tokenizer_lock:
                segments = lay_out()
        except PromptError as error:
            raise ApiError(400, error.found.replace("`", ""), error.field or field) from None
        tokens, model = sum(len(s.ids) for s in segments), self._model
        if not tokens:
            raise ApiError(400, "the prompt is empty: there is nothing to read", field)
        most, found = self.settings.max_prompt_tokens, None
        if most is not None and tokens > most:
            found = f"the prompt has {tokens:,} tokens, the server takes {most:,}: shorten it"
        try:
            check_context(model, segments, k=k)
        except PromptError as error:
            most, found = model.context_length, error.found
        if found is not None:
            raise _too_long(most, found, field)
        return segments

    def _lay_out_chat(self, completion: ChatCompletion) -> list[Segment]:
        segments = self._whole(completion, self.provider.layout.keep)
        if completion.rounds is None:
            return segments
        whole = self._whole(completion) if self.provider.layout.keep else segments
        return numbered(self.tokenizer, segments, whole)

    def _whole(self, completion: ChatCompletion, keep: tuple[str, ...] = ()) -> list[Segment]:
        """A conversation laid out, without numbers; each merged text whole where none are kept."""
        options = self.settings.chat_template_args | completion.chat_template_kwargs
        options |= {"tools": tools} if (tools := completion.offered_tools) else {}
        messages = completion.messages
        layout = replace(self.provider.layout, date=self._dates.of(messages), keep=keep)
        how = {"note": self._note_once, "merge": completion.merge}
        return lay_out_chat(self.tokenizer, messages, layout, options, **how)

    def _lay_out(self, prompt: str | list[int], merge: bool | None) -> list[Segment]:
        layout = self.provider.layout
        if isinstance(prompt, list):
            if merged_text(self.tokenizer) is not None:
                if merge:
                    message = "merge: these are ids of the model, and its encoder reads text"
                    raise ApiError(400, message, "prompt")
                return [Segment(prompt, False)]
            # In bare ids, a question looks like a context.
            return [Segment(prompt, layout.merges == ALL if merge is None else merge)]
        if merge is not None:
            return lay_out_spans(self.tokenizer, [Span(prompt)], merge, layout)
        return lay_out_text(self.tokenizer, prompt, layout, self._note_once)

    def _note_once(self, what: str, why: str) -> None:
        """Logs why a long text of a request does not merge, the first time."""
        if self.provider.source.k > 1 and why not in self._noted:
            self._noted.add(why)
            _log.info("%s does not merge: %s (docs/prompts.md; logged once)", what, why)


def _too_long(most: int, found: str, field: str) -> ApiError:
    """The refusal of a prompt, in OpenAI's words, which clients look for."""
    message = f"This model's maximum context length is {most} tokens. However, {found}"
    return ApiError(400, message, field, "context_length_exceeded")
