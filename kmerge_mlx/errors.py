"""The exceptions a user can cause, one family.

Every message is one line (or a list of one-line findings) that says what was found, what was
expected, and which flag or file to change. The CLI prints it and exits 1; nothing here prints.
"""

from __future__ import annotations

from collections.abc import Sequence


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
    """

    def __init__(self, found: str, advice: str = ""):
        super().__init__(f"{found}: {advice}" if advice else found)
        self.found = found


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
    """Joins everything wrong with one input into one message.

    Args:
        summary: What the problems belong to, without a colon.
        problems: One line each, at least one.

    Returns:
        ``summary: problem`` for a single problem, else the summary and an indented list.
    """
    if len(problems) == 1:
        return f"{summary}: {problems[0]}"
    return f"{summary}: {len(problems)} problems\n" + "\n".join(f"  - {p}" for p in problems)


def first_line(error: BaseException) -> str:
    """What another library said, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def of_mlx_lm(error: BaseException) -> str:
    """What mlx-lm says of options that it refuses, with this project's names for them."""
    reason = first_line(error).replace("[quantize]", "--kv-bits and --kv-group-size:")
    return f"mlx-lm refused these options: {reason}"


def short(value: object) -> str:
    """A value as it may stand in an error: printable, and no longer than 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
