"""The errors that a user can cause, one family.

A message is one line, or a summary and a list, and says what was found, what was expected and what
to change. A setting stands in backticks; the command line writes its flag.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class KMergeError(Exception):
    """Base of everything that is the input's fault and not a bug."""


class SettingsError(KMergeError):
    """Settings of the wrong type, out of range, or that exclude each other."""


class CheckpointError(KMergeError):
    """A PyTorch or PEFT checkpoint that cannot be read or cannot be converted."""


class AdapterError(KMergeError):
    """An adapter folder that is torn, foreign, or made for another base model."""


class ModelError(KMergeError):
    """A base model that cannot be found, loaded or given merged prompts."""


class PromptError(KMergeError):
    """A prompt that cannot be read, is empty, or does not fit.

    Args:
        found: What is wrong.
        advice: What helps on the command line, where a server's client could not do it.
        field: Which message, or part of one, it is about: ``messages[0].role``.
    """

    def __init__(self, found: str, advice: str = "", field: str | None = None):
        super().__init__(f"{found}: {advice}" if advice else found)
        self.found, self.field = found, field


class DataError(KMergeError):
    """Examples that cannot be read, made, fetched or turned into tokens."""


class TrainError(KMergeError):
    """Training that cannot start as it was asked for, or cannot go on."""


class EvaluateError(KMergeError):
    """An evaluation that cannot start as it was asked for, or cannot go on."""


class PlotError(KMergeError):
    """A picture that cannot be drawn or written."""


class ServeError(KMergeError):
    """A server that cannot start as it was asked for."""


class UploadError(KMergeError):
    """An upload that cannot start as it was asked for, or that the hub refused."""


class BlockTableFullError(KMergeError):
    """More distinct blocks are in use at once than the block table has slots."""


def findings(summary: str, problems: Sequence[str]) -> str:
    """Everything wrong with one input in one message: ``summary: problem``, or an indented list."""
    if len(problems) == 1:
        return f"{summary}: {problems[0]}"
    return f"{summary}: {len(problems)} problems\n" + "\n".join(f"  - {p}" for p in problems)


def collect(problems: list[str], read: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a reader, or None with its complaint put on the list."""
    try:
        return read(*arguments)
    except KMergeError as error:
        problems.append(str(error))
        return None


# What Python says of a class that is made from a config.
_LACKING = re.compile(r"\w+\.__init__\(\) missing \d+ required positional arguments?: ")


def first_line(error: BaseException | str) -> str:
    """The first line of another library's error, or the name of its class.

    With what follows, where it ends in a colon; a setting is called as ours are.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0].rstrip()
    if isinstance(error, KeyError):
        line += " is missing"
    if line.endswith(":") and len(lines) > 1:
        line += f" {lines[1].strip()}"
    line = _LACKING.sub("its config lacks ", line)
    return re.sub("`?trust_remote_code=True`?", "`trust_remote_code`", line)


@contextmanager
def one_line_refusals() -> Iterator[None]:
    """Turns what mlx-lm refuses (--top-k past the vocabulary, say) into a ``KMergeError``."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        reason = first_line(error).replace("[quantize]", "`kv_bits` and `kv_group_size`:")
        raise KMergeError(f"mlx-lm refused these options: {reason}") from error


def short(value: object) -> str:
    """A value as it may stand in an error: printable, and not longer than 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


# All but line ends and tabs; and what turns the direction of all that follows.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")


def printable(text: str) -> str:
    """A text whose control characters, which a terminal would obey, are written out."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
