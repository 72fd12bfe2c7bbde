"""What every Python client is asked here, and what is right; ``run.sh`` sets the address."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

URL, KEY, MODEL = os.environ["BASE_URL"], "none", "bundled"
TREE = (Path(__file__).parents[2] / "tree.txt").read_text()  # the right answer is "true"
DOCUMENT, QUESTION = TREE.split(", Task:")
TAGGED = f"<merge>{TREE}</merge>"
TWO_PARTS = f"<merge>{DOCUMENT}</merge><raw>, Task:{QUESTION}</raw>"
TOO_LONG = "A " * 10_000
OVERFLOW = "maximum context length is 4096 tokens"


class Verdict(BaseModel, extra="forbid"):
    """What an answer in a schema is here."""

    right: Literal["true", "false"]


def is_verdict(found: Any) -> bool:
    """An answer that the client made an object of."""
    return isinstance(found, Verdict)


def check(what: str, ask: Callable[[], Any], right: Callable[[Any], bool] | Any = None) -> None:
    """Asks, and prints a line of the table: the client's own exception or answer, and a verdict."""
    try:
        found = ask()
        good = right(found) if callable(right) else found == right
    except Exception as error:
        found, good = f"{type(error).__name__}: {error}", False
    print(f"{'ok' if good else 'FAILED'}\t{what}\t{' '.join(str(found).split())[:300]}")


def refused(ask: Callable[[], Any]) -> str:
    """What a client shows of a refusal."""
    try:
        return f"not refused: {ask()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def overflows(shown: str) -> bool:
    """A refusal of a prompt that is too long."""
    return OVERFLOW in shown and not shown.startswith("not refused")
