"""``kmerge-mlx fuse`` and ``quantize``: commands that write a model folder."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from kmerge_mlx.adapters.packing import BITS
from kmerge_mlx.cli.inputs import command
from kmerge_mlx.cli.output import bar, note
from kmerge_mlx.cli.texts import read_prompt
from kmerge_mlx.settings import ModelSettings, argument, option

if TYPE_CHECKING:
    from kmerge_mlx.tools.fuse import Drift, Gap

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")  # MLX's ways to quantize


@dataclass(frozen=True)
class NewModelSettings(ModelSettings):
    """What a command that writes a model folder has."""

    files: tuple[str, ...] = argument(
        "FILE",
        "Text to measure the drift on; `-` is stdin. Default: random tokens.",
        many=True,
        required=False,
    )
    force: bool = option(False, bool, "Replace a model folder.")


@dataclass(frozen=True)
class FuseSettings(NewModelSettings):
    """What to fuse, and where to."""

    NAME = "fuse"

    save_path: str = option("fused_model", str, "Model folder to write.")
    dequantize: bool = option(
        False, bool, "Write floating-point weights. Default: what is quantized is quantized again."
    )


@command(FuseSettings)
def fuse(settings: FuseSettings) -> None:
    """Put an adapter's LoRA into its base's weights.

    Writes one model folder, whole or not at all, that mlx-lm runs as it is; the merge encoder comes
    along in its kmerge/, where every command finds it. A tied model whose output head has LoRA gets
    a head of its own. How far the result is from base and adapter is measured and printed.

    \b
    Examples:
      kmerge-mlx fuse --model M --adapter-path A --k 4 --save-path fused
      kmerge-mlx generate --model fused report.txt -p "What changed in May?"
      kmerge-mlx fuse --adapter-path A --save-path fused --dequantize my-text.txt
    """
    how = _read(settings)

    from kmerge_mlx.tools.fuse import fuse as write

    done = write(save_path=settings.save_path, dequantize=settings.dequantize, **how)
    kind, k = "quantized" if done.quantized else "floating-point", done.merge_factor
    encoder = f"the merge encoder for K = {k}" if k > 1 else "no merge encoder"
    _print_made(f"{settings.save_path}: {kind} weights, {encoder}", done.drift, how["text"])
    if done.untied:
        note(
            "note: the output head had LoRA of its own, so it is no longer the embedding table: "
            "the model has an lm_head, and tie_word_embeddings is false"
        )


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
    how = _read(settings)

    from kmerge_mlx.tools.quantize import Packing
    from kmerge_mlx.tools.quantize import quantize as write

    packing = Packing(
        settings.q_bits, settings.q_group_size, settings.q_mode, settings.quantize_embedding
    )
    done = write(
        mlx_path=settings.mlx_path, packing=packing, encoder_bits=settings.encoder_bits, **how
    )
    k, bits = done.merge_factor, f"{done.bits_per_weight:.2f} bits per weight"
    carries = "no adapter" if k is None else f"the adapter for K = {k}"
    _print_made(f"{settings.mlx_path}: {bits}, {carries}", done.drift, how["text"])
    if done.tied and not settings.quantize_embedding:
        note(
            "note: the embedding table is the output head as well, and neither is quantized: "
            "--quantize-embedding quantizes both"
        )


def _read(settings: NewModelSettings) -> dict[str, Any]:
    """What both commands give on: the text is read before anything is searched or loaded."""
    text = read_prompt(settings.files, None)[0] if settings.files else None

    from kmerge_mlx.source import Source

    source = Source.find(
        settings.model, settings.adapter_path, settings.k, settings.trust_remote_code
    )
    return {"source": source, "text": text, "force": settings.force, "progress": bar}


def _print_made(what: str, drift: Drift | None, text: str | None) -> None:
    """Says what was written, and how far it is from what it was made from."""
    if drift is None:
        note(f"{what}\nStopped before the drift was measured: the folder is whole")
        raise typer.Exit(128 + signal.SIGINT)
    lines = [what, f"Drift on {'random tokens' if text is None else 'your text'}:"]
    if drift.merged is not None:
        lines += [
            f"  merged embeddings moved by {drift.embeddings_mean:.3%} of their length, "
            f"{drift.embeddings_max:.3%} at most ({drift.blocks:,} blocks)",
            f"  after a merged prompt {_moved(drift.merged)}",
        ]
    lines.append(f"  after a plain prompt {_moved(drift.plain)}")
    note("\n".join(lines))


def _moved(gap: Gap) -> str:
    return (
        f"log-probabilities moved by {gap.mean:.2g}, {gap.max:.2g} at most; the likeliest token "
        f"stayed at {gap.same:.1%} of {gap.positions:,} positions"
    )
