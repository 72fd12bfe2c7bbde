"""What ``fuse`` and ``quantize`` say of the drift.

Owns the wording. Does not know how it is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kmerge_mlx.tools.drift import Drift, Gap


def drift_lines(drift: Drift, own_text: bool) -> str:
    """A drift in words, a line for each thing that was compared.

    Args:
        drift: What was measured.
        own_text: Whether on the user's own text.
    """
    lines = [f"Drift on {'your text' if own_text else 'random tokens'}:"]
    if drift.embeddings is not None:
        gap = drift.embeddings
        lines.append(
            f"  merged embeddings moved by {gap.mean:.3%} of their length, {gap.worst:.3%} at most "
            f"({gap.blocks:,} blocks)"
        )
    if drift.merged is not None:
        lines.append(f"  after a merged prompt {_moved(drift.merged)}")
    lines.append(f"  after a plain prompt {_moved(drift.plain)}")
    return "\n".join(lines)


def _moved(gap: Gap) -> str:
    return (
        f"log-probabilities moved by {gap.mean:.2g}, {gap.max:.2g} at most; the likeliest token "
        f"stayed at {gap.same:.1%} of {gap.positions:,} positions"
    )
