"""Answers in a JSON schema: a logits processor that allows only tokens that go on with such a text.

llguidance compiles a schema and says after each token which may follow.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from kmerge_mlx.errors import PromptError, first_line
from kmerge_mlx.generation import structured_trial

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_CHARACTERS = 1 << 17
"""Of a schema as JSON: about what OpenAI takes."""

TRIAL_SECONDS = 5
"""Of a processor that a new schema may take to compile."""

MOST_STATES = 1 << 15
"""Of a schema's patterns, met while an answer is made: each takes 1 or 2 KB."""

_OPTIONS = {
    "whitespace_pattern": "[ ]?",  # a model that may write more sometimes writes nothing else
    "coerce_one_of": True,  # as anyOf: Pydantic writes oneOf for a union with a discriminator
    "lenient": False,  # a keyword that cannot be followed is refused
}
# Keywords that hold schemas by names of their own, and those that hold no schema.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "default", "examples")


class Schemas:
    """Compiles JSON schemas for one model.

    Args:
        tokenizer: mlx-lm's wrapper of a fast tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._wrapper = tokenizer

    def compile(self, schema: Mapping[str, Any]) -> Grammar:
        """Compiles a schema; it takes milliseconds, or up to :data:`TRIAL_SECONDS`.

        Raises:
            PromptError: No text fits it, it has a keyword that llguidance cannot follow, it takes
                too much time or memory, or llguidance is missing.
        """
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            what = "`json_schema` needs llguidance: pip install 'kmerge-mlx[structured]'"
            raise PromptError(what) from None
        try:
            # llguidance reads options of its own in a schema.
            text = json.dumps({k: v for k, v in _known(schema).items() if k != "x-guidance"})
            if len(text) > MOST_CHARACTERS:
                raise _refused(f"it has {len(text):,} characters, more than {MOST_CHARACTERS:,}")
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
        except (ValueError, RecursionError) as error:
            raise _refused(first_line(error)) from None
        _try(grammar)
        limits = LLParserLimits(max_lexer_states=MOST_STATES)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Grammar(matcher, self._ends)

    def read_vocabulary(self) -> None:
        """Does now what the first schema needs: it takes a second or two, in which no thread runs.

        Raises:
            ImportError: llguidance is missing.
            PromptError: The tokenizer does not fit.
        """
        _ = self._tokenizer

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """The tokens as llguidance sees them."""
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._wrapper._tokenizer, eos_token=self._ends)
        except ValueError as error:
            raise _refused(f"llguidance cannot read the tokenizer: {first_line(error)}") from None

    @cached_property
    def _ends(self) -> list[int]:
        known = set(self._wrapper.get_vocab().values())
        ends = sorted(known & set(self._wrapper.eos_token_ids))
        if not ends:
            raise _refused("the tokenizer has no token that ends an answer")
        return ends


@lru_cache(64)
def _try(grammar: str) -> None:
    """Refuses a grammar that cannot be compiled, or not in bounded time, memory and stack."""
    line = [sys.executable, "-P", structured_trial.__file__, str(TRIAL_SECONDS)]
    done = subprocess.run(line, input=grammar, capture_output=True, encoding="utf-8")
    if done.returncode == -signal.SIGXCPU:
        raise _refused(f"it takes over {TRIAL_SECONDS} s to compile: make it simpler")
    if done.returncode:
        raise _refused("it takes too much memory to compile: make it simpler, or less deep")
    if done.stdout:
        raise _refused(done.stdout)


def _known(schema: Any) -> Any:
    """A schema without ``uniqueItems: false``, which changes nothing, and llguidance refuses."""
    if isinstance(schema, list):
        return [_known(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, dict):
            kept[name] = {key: _known(item) for key, item in value.items()}
        elif name != "uniqueItems" or value is not False:
            kept[name] = value if name in _VALUES else _known(value)
    return kept


def _refused(reason: str) -> PromptError:
    reason = first_line(reason)[:200].rstrip(": ")
    if reason.startswith("NoExtension"):
        reason = "no text fits it"
    return PromptError(f"`json_schema` cannot be followed: {reason}")


@dataclass(frozen=True)
class Grammar:
    """A compiled schema: llguidance's state before the first token, and the tokens that end."""

    matcher: LLMatcher
    ends: Sequence[int]


class Follow:
    """A logits processor, for one answer, that allows what a grammar allows.

    It has to know the last token before it can say what may follow, so it waits for it: a step of
    such an answer begins when the one before it has ended.

    Args:
        grammar: The compiled schema.
        fail: Told once if the answer cannot go on; the logits are then left as they are.
        after: Tokens after which the schema begins, such as the end of thinking.
    """

    def __init__(
        self, grammar: Grammar, fail: Callable[[PromptError], None], after: Sequence[int] = ()
    ):
        self._matcher, self._grammar, self._fail = grammar.matcher.deep_copy(), grammar, fail
        self._after, self._last = list(after), []  # the marker that it waits for, and what came
        self._read: int | None = None  # tokens so far, the prompt's too
        self._failed = False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Sets the logits ``(1, V)`` of what may not follow to minus infinity.

        Args:
            tokens: Of the prompt, in any form, and of the answer.
            logits: For the next token.
        """
        if self._failed:
            return logits
        new = [] if self._read is None else tokens[self._read :].tolist()
        self._read = len(tokens)
        try:
            allowed = self._allowed(new, logits.shape[-1])
        except Exception as error:  # whatever it is, it must not end other answers
            self._failed = True
            self._fail(_refused(first_line(error)))
            return logits
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def _allowed(self, new: list[int], size: int) -> np.ndarray:
        """Which tokens may follow, ``(V,)``, as bool."""
        for token in new:
            if self._after:
                self._last = [*self._last, token][-len(self._after) :]
                if self._last == self._after:
                    self._after = []
            else:
                self._matcher.consume_token(token)
        if self._after:
            return ~np.isin(np.arange(size), self._grammar.ends)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())
        # The model's table may have rows past the tokenizer's: these stay zero.
        allowed = np.unpackbits(bits, bitorder="little", count=size).astype(bool)
        if not allowed.any():
            raise ValueError("no token of the model goes on with it")
        return allowed
