"""The texts that commands are given: files, stdin, a prompt, and what of them cannot be read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.errors import PromptError
from kmerge_mlx.formats import not_text
from kmerge_mlx.prompts.tags import Span, parse

STDIN = "-"
MAX_TEXT_BYTES = 64 << 20
"""Longest text that is read: some 16 million tokens, more than any model's context."""
_PIECE = 1 << 16  # characters of a long text that are counted at once
_LONG = 8  # characters for each token that fits: so many and more are counted piece by piece


def read_prompt(
    files: Sequence[str], prompt: str | None
) -> tuple[str | None, list[Span], str | None]:
    """The text to merge, its spans, and the text to keep raw, with its tags.

    As in mlx-lm, ``-`` is stdin, and a written ``\\n`` or ``\\t`` in ``prompt`` is the character.
    """
    if [*files, prompt].count(STDIN) > 1:
        raise PromptError("`-` is given more than once, but stdin can be read only once")
    if prompt == "":
        raise PromptError("`prompt` is empty: leave it out, or give it text")
    if prompt is None and not files:
        raise PromptError("the prompt is empty: give a FILE to compress, or `prompt`")
    context = CONTEXT_SEPARATOR.join(read_text(name) for name in files) or None
    if prompt == STDIN:
        prompt = read_text(STDIN)
    elif prompt is not None:
        prompt = prompt.replace("\\n", "\n").replace("\\t", "\t")
    name = files[0] if len(files) == 1 else "the FILEs, one after the other"
    return context, parse(context or "", name), prompt


def read_text(name: str) -> str:
    """The text of a file, or of stdin for ``-``, without a byte-order mark."""
    shown = "stdin" if name == STDIN else name
    if name == STDIN and sys.stdin is None:
        raise PromptError("cannot read stdin: it is closed")
    try:
        if name == STDIN:
            data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise PromptError(f"{shown} holds over {MAX_TEXT_BYTES >> 20} MiB: no model reads that")
        if kind := not_text(data):
            raise PromptError(f"{shown} is {kind}: give its text, as a file in UTF-8")
        text = data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise PromptError(f"cannot read {shown}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{shown} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
            "save the file as UTF-8"
        ) from None
    if not text:
        raise PromptError(f"{shown} is empty: put the text to compress in it")
    return text


def check_length(text: str, tokenizer: Any, context: int | None, k: int) -> None:
    """Refuses a text that fills a model's context however it merges, before all of it is tokenized.

    ``context`` is the model's, in positions.
    """
    most = (context or 0) * k
    if not most or len(text) <= _LONG * most:
        return
    found = 0
    for start in range(0, len(text), _PIECE):
        piece = text[start : start + _PIECE]
        # A cut makes up to two tokens more.
        found += max(len(tokenizer.encode(piece, add_special_tokens=False)) - 2, 0)
        if found > most:
            remedy = ", or use an adapter with a larger K" if k > 1 else ""
            raise PromptError(
                f"the text of {len(text):,} characters has over {most:,} tokens at K = {k}, and "
                f"the model's context is {context:,}: shorten it{remedy}"
            )
