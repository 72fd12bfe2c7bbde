"""Tables for people: text in columns.

Owns how they are aligned, and how sizes are written. Does not know what is in them.
"""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells to lines of text: the first column is flush left, the others flush right.

    Args:
        lines: The cells of each line, the heads' included; as many in each.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)


def size(count: float) -> str:
    """Bytes as people read them: three digits and a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:  # more would be rounded to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 999.5 else f"{count:,.0f} GB"
