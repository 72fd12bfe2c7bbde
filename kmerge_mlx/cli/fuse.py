"""``kmerge-mlx fuse``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmerge_mlx.cli.inputs import command
from kmerge_mlx.settings import ModelSettings, argument, option

if TYPE_CHECKING:
    from kmerge_mlx.tools.fuse import Drift, Gap


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
        False,
        bool,
        "Write floating-point weights. Default: what is quantized is quantized again.",
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
    text = read_text(settings)

    from kmerge_mlx.cli.output import bars
    from kmerge_mlx.source import Source
    from kmerge_mlx.tools import fuse as fusing

    done = fusing.fuse(
        Source.find(settings.model, settings.adapter_path, settings.k, settings.trust_remote_code),
        settings.save_path,
        dequantize=settings.dequantize,
        text=text,
        force=settings.force,
        progress=bars(quiet=False),
    )
    kind = "quantized weights" if done.quantized else "floating-point weights"
    encoder = "no merge encoder"
    if done.merge_factor > 1:
        encoder = f"the merge encoder for K = {done.merge_factor}"
    print_made(f"{settings.save_path}: {kind}, {encoder}", done.drift, text)
    if done.untied:
        print(
            "note: the output head had LoRA of its own, so it is no longer the embedding table: "
            "the model has an lm_head, and tie_word_embeddings is false",
            file=sys.stderr,
        )


def read_text(settings: NewModelSettings) -> str | None:
    """The text to measure the drift on, or None."""
    from kmerge_mlx.cli.inputs import read_prompt

    return read_prompt(list(settings.files), None)[0] if settings.files else None


def print_made(what: str, drift: Drift, text: str | None) -> None:
    """Says what was written, and how far it is from what it was made from."""
    lines = [what, f"Drift on {'random tokens' if text is None else 'your text'}:"]
    if drift.merged is not None:
        lines += [
            f"  merged embeddings moved by {drift.embeddings_mean:.3%} of their length, "
            f"{drift.embeddings_max:.3%} at most ({drift.blocks:,} blocks)",
            f"  after a merged prompt {_moved(drift.merged)}",
        ]
    lines.append(f"  after a plain prompt {_moved(drift.plain)}")
    print("\n".join(lines), file=sys.stderr)


def _moved(gap: Gap) -> str:
    return (
        f"log-probabilities moved by {gap.mean:.2g}, {gap.max:.2g} at most; the likeliest token "
        f"stayed at {gap.same:.1%} of {gap.positions:,} positions"
    )
