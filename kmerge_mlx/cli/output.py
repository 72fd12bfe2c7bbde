"""What commands show besides their result: progress bars, notes on stderr, tables."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.errors import printable
from kmerge_mlx.prompts.keep import NONE
from kmerge_mlx.prompts.policy import ALL, Layout

if TYPE_CHECKING:
    from kmerge_mlx.generation.cost import Spread
    from kmerge_mlx.source import Source

NO_TERMINAL = 10_000  # columns of a table that goes to a file
SECONDS_BETWEEN_LINES = 30  # of progress, where stderr is not a terminal


class Terminal:
    """Stdout where it is a terminal: what strangers' files say, and models write, is only text."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, its control characters written out."""
        return self._stream.write(printable(text))


def note(text: str) -> None:
    """Prints on stderr what is not a result, above the progress bar if there is one.

    Work does not end because nobody can be told of it.
    """
    from tqdm import tqdm

    if sys.stderr is not None:
        try:
            tqdm.write(printable(text), file=sys.stderr)
        except OSError:
            sys.stderr = None  # Python would try it again at exit


_results: TextIO | None = None
"""Where results go while all else that is printed goes to stderr."""


@contextlib.contextmanager
def clean_stdout() -> Iterator[None]:
    """Leaves stdout to :func:`print_json`: mlx-lm prints warnings there, about large models."""
    global _results
    kept, _results = _results, sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results = kept


def print_json(value: Any) -> None:
    """Prints a command's result as one line of JSON on stdout."""
    print(json.dumps(value, ensure_ascii=False), file=_results or sys.stdout)


def note_unnamed(model: str | None, adapter_path: str | None) -> bool:
    """Notes that the bundled model speaks where no other is named; returns whether it does."""
    unnamed = model is None and adapter_path is None
    if unnamed:
        note("note: no --model and no --adapter-path: the bundled model reads, which knows trees")
    return unnamed


def speaker(source: Source) -> str:
    """Which model answers, and how it reads, in words."""
    if source.model == source.adapter_path == BUNDLED:
        return f"the bundled model, which knows only trees (K = {source.k})"
    if source.merge is None:
        return f"{source.model}, without an adapter: nothing merges"
    return f"{source.model} with {source.adapter_path} (K = {source.k})"


@contextlib.contextmanager
def on_signals(act: Callable[[int], None]) -> Iterator[None]:
    """Lets Ctrl-C and ``kill`` do no more than call a function with the signal's number."""
    signals = (signal.SIGINT, signal.SIGTERM)
    kept = {s: signal.signal(s, lambda number, frame: act(number)) for s in signals}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def note_layout(stored: Layout | None, used: Layout, has_template: bool) -> None:
    """Notes when prompts are laid out in another way than in training, where that is recorded."""
    if stored is None:
        return
    found = []
    if has_template and stored.chat_template != used.chat_template:
        found.append("with a chat template" if stored.chat_template else "without a chat template")
    if stored.merges != used.merges:
        found.append(f"with --merges {stored.merges}")
    elif stored.threshold != used.threshold and used.merges != ALL:
        found.append(f"with --merge-threshold {stored.threshold}")
    if stored.keep != used.keep:
        found.append(f"with --keep {','.join(stored.keep) or NONE}")
    if found:
        note(f"note: this adapter was trained {' and '.join(found)}")


def bar(label: str) -> Callable[[int, int], None]:
    """Progress of long work: a bar on a terminal, and elsewhere a line now and then.

    What is returned is called with (work done, work in all).
    """
    shown: Any = None
    reported = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown, reported
        if sys.stderr.isatty():
            from tqdm import tqdm

            shown = shown or tqdm(total=total, desc=label, leave=False)
            shown.update(done - shown.n)
            if done >= total:
                shown.close()
        elif time.monotonic() - reported > SECONDS_BETWEEN_LINES:
            reported = time.monotonic()
            note(f"{label}: {done:,} of {total:,}")

    return progress


def wrapped(text: str) -> str:
    """A line that is cut between words where it is longer than the terminal is wide."""
    return textwrap.fill(text, _width(), break_long_words=False, break_on_hyphens=False)


def _width() -> int:
    """Columns of the terminal; plenty where stdout is none."""
    if sys.stdout.isatty():
        return shutil.get_terminal_size((NO_TERMINAL, 24)).columns
    return NO_TERMINAL


def aligned(lines: Sequence[Sequence[str]], kept: int = 1) -> str:
    """A table of lines of cells: the first column is flush left, the others flush right.

    Where it is wider than the terminal, the columns that are left over follow below, beside the
    first ``kept`` ones again.
    """
    first, *others = zip(*lines, strict=True)
    columns = [[cell.ljust(max(map(len, first))) for cell in first]]
    columns += [[cell.rjust(max(map(len, column))) for cell in column] for column in others]
    width, tables = _width(), [columns[:kept]]
    for column in columns[kept:]:
        wide = sum(len(each[0]) + 2 for each in tables[-1]) + len(column[0]) > width
        if wide and len(tables[-1]) > kept:
            tables.append(columns[:kept])
        tables[-1] = [*tables[-1], column]
    return "\n\n".join(
        "\n".join("  ".join(cells).rstrip() for cells in zip(*table, strict=True))
        for table in tables
    )


def seconds(spread: Spread, with_ends: bool = True) -> str:
    """A median time as people read it, and how far the rounds were apart."""
    if spread.median < 1:
        milli = type(spread).of(1e3 * trial for trial in spread.trials)
        return figure(milli, "{:.1f}", with_ends, " ms")
    return figure(spread, "{:.2f}", with_ends, " s")


def figure(value: Spread | None, form: str, with_ends: bool, unit: str = "") -> str:
    """A median, and how far the rounds were apart."""
    if value is None:
        return "-"
    ends = f" ({form.format(value.min)}-{form.format(value.max)})" if with_ends else ""
    return f"{form.format(value.median)}{unit}{ends}"


def size(count: float) -> str:
    """Bytes as people read them: three digits and a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:  # more would be rounded to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 999.5 else f"{count:,.0f} GB"
