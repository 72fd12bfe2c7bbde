"""Shows how far a long piece of work is, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30
"""In a log file, work before training says how far it is."""


def bars(quiet: bool) -> Callable[[str], Callable[[int, int], None]]:
    """Progress bars for the work before training.

    Args:
        quiet: Whether another machine shows it.

    Returns:
        A label to what is called with (work done, work in all).
    """

    return lambda label: _Bar(label, quiet)


class _Bar:
    """One piece of work: a bar on a terminal, and a line now and then where there is none."""

    def __init__(self, label: str, quiet: bool):
        self._label, self._quiet = label, quiet
        self._bar: Any = None
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._bar = self._bar or tqdm(total=total, desc=self._label, leave=False)
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._bar.close()
        elif time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            print(f"{self._label}: {done:,} of {total:,}", file=sys.stderr, flush=True)
