"""How weights are quantized: the settings for a base, and the packing of a merge encoder.

Owns: the defaults of ``kmerge-mlx quantize``, the schema of the encoder's entry in
``merge_config.json``, and the names and shapes of its packed tensors. Knows nothing of arrays.

Source: ``mlx_lm.convert``; ``mlx.nn.QuantizedLinear``, mode ``affine``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kmerge_mlx.errors import AdapterError, short

ENTRY = "encoder_quantization"
"""Its name in ``merge_config.json``; absent where the encoder is not quantized."""

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (64, 32, 128)
"""MLX's, the ones that it prefers first."""

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
"""MLX's, for a base; an encoder is packed by the first."""


@dataclass(frozen=True)
class QuantizeConfig:
    """How a base is quantized; None is the mode's own default (``affine``: 4 bits, groups of 64).

    Args:
        bits: Of a weight.
        group_size: Weights that share a scale.
        mode: One of ``MODES``.
        embedding: Quantize the embedding table as well.
        encoder_bits: Of the merge encoder's weights, or None: it stays as it is.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = MODES[0]
    embedding: bool = False
    encoder_bits: int | None = None


@dataclass(frozen=True)
class EncoderQuantization:
    """How the weights of a merge encoder are packed.

    Args:
        bits: Of a number.
        group_size: How many numbers share a scale and a bias.

    Raises:
        AdapterError: Something that MLX does not pack.
    """

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        for name, known in (("bits", BITS), ("group_size", GROUP_SIZES)):
            value = getattr(self, name)
            if type(value) is not int or value not in known:
                raise AdapterError(f"{ENTRY}: {name} is {short(value)}, expected one of {known}")

    def divides(self, inner: int) -> bool:
        """Whether rows of so many numbers fall into whole groups."""
        return inner % self.group_size == 0

    def shapes(self, layer: str, out: int, inner: int) -> dict[str, tuple[int, int]]:
        """A weight ``(out, inner)`` as it is stored: packed, with scales and biases."""
        scales = (out, inner // self.group_size)
        return {
            f"{layer}.weight": (out, inner * self.bits // 32),
            f"{layer}.scales": scales,
            f"{layer}.biases": scales,
        }

    @classmethod
    def of_width(cls, bits: int, widths: Iterable[int]) -> EncoderQuantization:
        """The packing for weights with rows of these widths.

        Raises:
            AdapterError: No group size divides all of them, or no such bits.
        """
        widths = sorted(set(widths))
        for group_size in GROUP_SIZES:
            if all(width % group_size == 0 for width in widths):
                return cls(bits, group_size)
        raise AdapterError(
            f"the merge encoder cannot be quantized: it reads {', '.join(map(str, widths))} "
            f"numbers, and none of MLX's groups of {GROUP_SIZES} divides all of them"
        )

    @classmethod
    def from_json(cls, data: Any) -> EncoderQuantization | None:
        """Reads the entry; null and nothing are: not quantized.

        Raises:
            AdapterError: Anything else than ``{"bits": b, "group_size": g}``.
        """
        if data is None:
            return None
        if not isinstance(data, dict) or set(data) != {"bits", "group_size"}:
            raise AdapterError(
                f"merge_config.json: {ENTRY} is {short(data)}, expected null or an object with "
                "bits and group_size"
            )
        return cls(**data)
