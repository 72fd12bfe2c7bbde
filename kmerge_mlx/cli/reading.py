"""What commands read their prompts from, and the bar while a model reads them.

Owns files, stdin and mlx-lm's conventions for ``--prompt``.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.errors import PromptError
from kmerge_mlx.prompts.lay_out import decode_text
from kmerge_mlx.prompts.tags import parse

STDIN = "-"
Files = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE", help="Text to compress; `-` is stdin. Several are joined by a blank line."
    ),
]


def read_prompt(files: list[str], prompt: str | None) -> tuple[str | None, str | None]:
    """The text to merge and the text to keep raw.

    Args:
        files: Names of files, ``-`` for stdin.
        prompt: The ``--prompt`` text with mlx-lm's conventions: ``-`` is stdin, and a written
            ``\\n`` or ``\\t`` means the character.

    Raises:
        PromptError: Nothing to read, a file that is missing, empty or not UTF-8, or tags that do
            not pair.
    """
    if [*files, prompt].count(STDIN) > 1:
        raise PromptError("`-` is given more than once, but stdin can be read only once")
    if prompt == "":
        raise PromptError("--prompt is empty: leave it out, or give it text")
    context = CONTEXT_SEPARATOR.join(_read_text(name) for name in files) or None
    if context is not None:  # here it can still be told what it is called
        parse(context, files[0] if len(files) == 1 else "the FILEs, one after the other")
    if prompt == STDIN:
        return context, _read_text(STDIN)
    if prompt is not None:
        return context, prompt.replace("\\n", "\n").replace("\\t", "\t")
    if context is None:
        raise PromptError("the prompt is empty: give a FILE to compress, or --prompt")
    return context, None


def _read_text(name: str) -> str:
    if name == STDIN and sys.stdin is None:
        raise PromptError("cannot read stdin: it is closed")
    try:
        data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read {name}: {error.strerror}") from None
    return decode_text(data, "stdin" if name == STDIN else name)


def json_object(text: str | None, flag: str = "--chat-template-config") -> dict[str, Any]:
    """What an option that takes a JSON object holds; empty without it.

    Args:
        text: What was given, or None.
        flag: The option's name.

    Raises:
        typer.BadParameter: It is no JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=flag) from None
    if not isinstance(value, dict):
        raise typer.BadParameter("not a JSON object", param_hint=flag)
    return value


@contextlib.contextmanager
def prefill_bar(step_size: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr while a prompt of several prefill steps is read, if anyone looks.

    Args:
        step_size: Positions prefilled at once.

    Yields:
        mlx-lm's ``prompt_progress_callback``: called with (positions read, positions in all).
    """
    bar: Any = None
    # Whatever ends the block, Ctrl-C included, gives the terminal its cursor back.
    with contextlib.ExitStack() as shown:

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if done == 0 and total > step_size and sys.stderr.isatty():
                bar = typer.progressbar(length=total, label="Reading", file=sys.stderr)
                shown.enter_context(bar)
            if bar is not None:
                bar.update(done - bar.pos)
            if done == total:
                shown.close()

        yield progress
