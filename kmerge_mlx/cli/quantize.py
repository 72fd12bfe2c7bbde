"""``kmerge-mlx quantize``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from kmerge_mlx.adapters.schema import BITS
from kmerge_mlx.cli.fuse import NewModelSettings, print_made, read_text
from kmerge_mlx.cli.inputs import command
from kmerge_mlx.settings import option

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")  # of MLX; an encoder is packed by the first


@dataclass(frozen=True)
class QuantizeSettings(NewModelSettings):
    """How to quantize, and where to."""

    NAME = "quantize"

    mlx_path: str = option("mlx_model", str, "Model folder to write.")
    q_bits: int | None = option(
        None, int, "Bits of a weight. Default: the mode's; affine has 4.", low=1
    )
    q_group_size: int | None = option(
        None, int, "Weights that share a scale. Default: the mode's; affine has 64.", low=1
    )
    q_mode: str = option(MODES[0], str, "MLX's way to quantize.", choices=MODES)
    quantize_embedding: bool = option(
        False, bool, "Quantize the embedding table too, which the merge encoder reads."
    )
    encoder_bits: int | None = option(
        None,
        int,
        "Quantize the merge encoder to so many bits; 8 is safe. Default: it stays as it is.",
        choices=BITS,
    )


@command(QuantizeSettings)
def quantize(settings: QuantizeSettings) -> None:
    """Quantize a base model for merging.

    As mlx_lm.convert -q does it, but for the embedding table, which merged embeddings are made
    from. With an adapter the folder carries it in its kmerge/, where every command finds it. How
    far the result is from what it was made from is measured and printed.

    \b
    Examples:
      kmerge-mlx quantize --model M --adapter-path A --k 4 --mlx-path m4bit my-text.txt
      kmerge-mlx quantize --model M --q-bits 8
      kmerge-mlx quantize --model fused --mlx-path small --encoder-bits 8
    """
    text = read_text(settings)

    from kmerge_mlx.cli.output import bars
    from kmerge_mlx.source import Source
    from kmerge_mlx.tools import quantize as quantizing

    packing = quantizing.Packing(
        settings.q_bits, settings.q_group_size, settings.q_mode, settings.quantize_embedding
    )
    done = quantizing.quantize(
        Source.find(settings.model, settings.adapter_path, settings.k, settings.trust_remote_code),
        settings.mlx_path,
        packing,
        settings.encoder_bits,
        text=text,
        force=settings.force,
        progress=bars(quiet=False),
    )
    carries = "no adapter"
    if done.merge_factor is not None:
        carries = f"the adapter for K = {done.merge_factor}"
    bits = f"{done.bits_per_weight:.2f} bits per weight"
    print_made(f"{settings.mlx_path}: {bits}, {carries}", done.drift, text)
    if done.tied and not settings.quantize_embedding:
        print(
            "note: the embedding table is the output head as well, and neither is quantized: "
            "--quantize-embedding quantizes both",
            file=sys.stderr,
        )
