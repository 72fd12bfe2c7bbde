"""``kmerge-mlx quantize``."""

from __future__ import annotations

import enum
import sys
from typing import Annotated

import typer

from kmerge_mlx.adapters.schema import BITS, MODES, QuantizeConfig
from kmerge_mlx.cli import options as opt
from kmerge_mlx.cli.drifts import drift_lines
from kmerge_mlx.cli.reading import read_prompt

DEFAULTS = QuantizeConfig()
Mode = enum.StrEnum("Mode", list(MODES))
MODE = Mode(DEFAULTS.mode)


def quantize(
    files: opt.DriftFiles = None,
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    k: opt.MergeFactor = None,
    mlx_path: Annotated[
        str, typer.Option("--mlx-path", help="Model folder to write.")
    ] = "mlx_model",
    q_bits: Annotated[
        int | None,
        typer.Option(
            "--q-bits",
            min=1,
            help="Bits of a weight. Default: the mode's; affine has 4.",
            show_default=False,
        ),
    ] = DEFAULTS.bits,
    q_group_size: Annotated[
        int | None,
        typer.Option(
            "--q-group-size",
            min=1,
            help="Weights that share a scale. Default: the mode's; affine has 64.",
            show_default=False,
        ),
    ] = DEFAULTS.group_size,
    q_mode: Annotated[Mode, typer.Option("--q-mode", help="MLX's way to quantize.")] = MODE,
    quantize_embedding: Annotated[
        bool,
        typer.Option(
            "--quantize-embedding",
            help="Quantize the embedding table too, which the merge encoder reads.",
        ),
    ] = DEFAULTS.embedding,
    encoder_bits: Annotated[
        int | None,
        typer.Option(
            "--encoder-bits",
            callback=opt.one_of(*BITS),
            help="Quantize the merge encoder to so many bits; 8 is safe. Default: it stays as it "
            "is.",
            show_default=False,
        ),
    ] = DEFAULTS.encoder_bits,
    force: opt.ForceModel = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
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
    text = read_prompt(files, None)[0] if files else None
    config = QuantizeConfig(q_bits, q_group_size, str(q_mode), quantize_embedding, encoder_bits)
    base, adapter = opt.chosen(model, adapter_path)

    from kmerge_mlx.cli.output import bars
    from kmerge_mlx.tools import quantize as quantizing

    done = quantizing.quantize(
        base,
        mlx_path,
        config,
        adapter,
        k,
        text=text,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=bars(quiet=False),
    )
    carries = "no adapter"
    if done.merge_factor is not None:
        carries = f"the adapter for K = {done.merge_factor}"
    print(
        f"{mlx_path}: {done.bits_per_weight:.2f} bits per weight, {carries}\n"
        f"{drift_lines(done.drift, bool(text))}",
        file=sys.stderr,
    )
    if done.tied and not quantize_embedding:
        print(
            "note: the embedding table is the output head as well, and neither is quantized: "
            "--quantize-embedding quantizes both",
            file=sys.stderr,
        )
