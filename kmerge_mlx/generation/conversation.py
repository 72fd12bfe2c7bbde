"""A conversation whose history is read in merged form, and each part of it once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.generation.stream import (
    GenerationResponse,
    fitting,
    positions_read,
    stream_generate,
)
from kmerge_mlx.prompts.chat_template import now
from kmerge_mlx.prompts.lay_out import lay_out_chat
from kmerge_mlx.prompts.policy import DEFAULT_LAYOUT, Layout
from kmerge_mlx.prompts.tags import Span, parsed
from kmerge_mlx.virtual_tokens import CompressedPrompt


@dataclass(frozen=True)
class History:
    """What a conversation holds.

    Args:
        turns: Questions asked.
        tokens: Original tokens of the last prompt, the history included.
        positions: Positions that it takes.
        cached: Positions of it that were not read again.
        kv_bytes: Bytes of the KV cache.
    """

    turns: int
    tokens: int
    positions: int
    cached: int
    kv_bytes: int


class Conversation:
    """Questions and answers, one after the other.

    Every turn lays out the whole conversation, as one long prompt would be; what the KV cache holds
    of it already is not read again.

    Args:
        model: A model from :func:`kmerge_mlx.load`.
        tokenizer: Its tokenizer.
        layout: What merges where nothing is specified, and whether a chat template applies.
        context: Text that stands before the first question and merges (or its spans), or None.
        system_prompt: Content of a leading system message, or None.
        template_options: Further arguments of ``apply_chat_template``.
        max_kv_size: Most positions that the KV cache keeps, or None: all.

    Raises:
        PromptError: Tags in the context that do not pair.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        layout: Layout = DEFAULT_LAYOUT,
        *,
        context: str | Sequence[Span] | None = None,
        system_prompt: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_kv_size: int | None = None,
    ):
        self._model, self._tokenizer, self._layout = model, tokenizer, layout
        self._context, self._options = parsed(context, "the context"), dict(template_options or {})
        self._system_prompt, self._max_kv_size = system_prompt, max_kv_size
        self.reset()

    def reset(self) -> None:
        """Forgets all but the context and the system prompt."""
        self.messages: list[dict[str, Any]] = []
        self._layout = replace(self._layout, date=now(self._tokenizer))
        if self._system_prompt is not None:
            self.messages.append({"role": "system", "content": self._system_prompt})
        self._turns = self._cached = 0
        self._empty_cache()
        self._prompt = CompressedPrompt([], [], [])

    @property
    def history(self) -> History:
        """What it holds now."""
        kv_bytes = sum(cache.nbytes for cache in self._cache)
        tokens, positions = len(self._prompt.original_ids), len(self._prompt.ids)
        return History(self._turns, tokens, positions, self._cached, kv_bytes)

    def ask(self, question: str, **options: Any) -> Iterator[GenerationResponse]:
        """Answers a question.

        Stopped before its end, the answer stays in the history as far as it went.

        Args:
            question: The user's next message, with or without tags.
            **options: Of :func:`kmerge_mlx.stream_generate`: ``max_tokens``, ``sampler``, ...

        Yields:
            One response a token. Its ``prompt_tokens`` are those that were read in this turn.

        Raises:
            PromptError: Tags that do not pair, a template that refuses, or a conversation that is
                longer than the model's context; nothing has changed then.
        """
        messages = [*self.messages, {"role": "user", "content": self._content(question)}]
        segments = lay_out_chat(self._tokenizer, messages, self._layout, self._options)
        prompt = fitting(self._model, self._tokenizer, segments)
        self._cached = self._keep_common(prompt.ids)
        self._prompt, self._turns = prompt, self._turns + 1
        rest = prompt.after(self._cached)
        texts, tokens = [], []
        try:
            for response in stream_generate(
                self._model, self._tokenizer, rest, prompt_cache=self._cache, **options
            ):
                texts.append(response.text)
                tokens.append(response.token)
                yield response
        finally:
            # If the prompt was not read to its end, the cache holds as much of it as was read.
            self._held = [*prompt.ids, *tokens][: positions_read(self._cache)]
            answer = {"role": "assistant", "content": "".join(texts)}
            self.messages = [*messages, answer] if texts else self.messages

    def _content(self, question: str) -> str | list[dict[str, Any]]:
        """The content of a question's message: after the context, if it is the first."""
        if not self._context or any(m["role"] == "user" for m in self.messages):
            return question
        parts = [
            {"type": "text", "text": span.text, "merge": span.merge is not False}
            for span in self._context
        ]
        return [*parts, {"type": "text", "text": CONTEXT_SEPARATOR + question}]

    def _keep_common(self, ids: list[int]) -> int:
        """Cuts the KV cache to what a prompt begins with, all but its last position at most."""
        pairs = zip(self._held, ids[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        excess = positions_read(self._cache) - common
        if excess and not can_trim_prompt_cache(self._cache):
            self._empty_cache()
            return 0
        trim_prompt_cache(self._cache, excess)
        return common

    def _empty_cache(self) -> None:
        self._cache = make_prompt_cache(self._model, self._max_kv_size)
        self._held: list[int] = []
