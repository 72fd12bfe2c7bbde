"""How a merge encoder's weights are packed, and in which ways they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kmerge_mlx.errors import AdapterError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (64, 32, 128)  # MLX's, the preferred one first


@dataclass(frozen=True)
class EncoderQuantization:
    """How an encoder's weights are packed, in MLX's affine mode: bits of each, weights a scale."""

    bits: int
    group_size: int

    @classmethod
    def of_width(cls, bits: int, widths: Sequence[int]) -> EncoderQuantization:
        """The packing for weights whose rows have these widths, which a group size must divide."""
        for size in GROUP_SIZES:
            if not any(width % size for width in widths):
                return cls(bits, size)
        raise AdapterError(
            f"the merge encoder cannot be quantized: it reads {', '.join(map(str, widths))} "
            f"numbers, and none of MLX's groups of {GROUP_SIZES} divides all of them"
        )
