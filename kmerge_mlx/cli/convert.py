"""``kmerge-mlx convert``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from kmerge_mlx.cli.inputs import command
from kmerge_mlx.settings import ModelSettings, Settings, argument, option


@dataclass(frozen=True)
class ConvertSettings(Settings):
    """What to convert, and where to."""

    source: str = argument("SRC", "Checkpoint folder, or hub repo id (user/name@revision).")
    destination: str = argument("DST", "Adapter folder to write.")
    model: str | None = option(
        None,
        str,
        "Base model, a folder or repo id: checks the fit and records what it says.",
    )
    k: int | None = ModelSettings.setting("k")
    dtype: str | None = option(
        None,
        str,
        "Cast the weights. Default: keep.",
        choices=("float32", "float16", "bfloat16"),
    )
    force: bool = option(False, bool, "Replace an adapter at DST.")


@command(ConvertSettings)
def convert(settings: ConvertSettings) -> None:
    """Turn a PyTorch checkpoint into an MLX adapter folder.

    The checkpoint is a folder with encoder.pth and a PEFT LoRA, or a hub repo of one. Needs no
    PyTorch and executes nothing from the files. DST is written whole or not at all.

    \b
    Examples:
      kmerge-mlx convert outputs/textualized_tree/large/step_last ./adapter
      kmerge-mlx convert ./checkpoint ./adapter --model Qwen/Qwen2.5-0.5B --k 4
      kmerge-mlx convert ./checkpoint ./adapter --dtype bfloat16 --force
    """
    from kmerge_mlx.convert.checkpoint import convert_checkpoint

    adapter = convert_checkpoint(
        settings.source,
        settings.destination,
        settings.model,
        settings.k,
        settings.dtype,
        settings.force,
    )
    print(summary(adapter, settings.destination), file=sys.stderr)
    if settings.model is None and not adapter.merge.base.fields:
        print(
            "note: without --model, only sizes tell a wrong base when the adapter is loaded",
            file=sys.stderr,
        )


def summary(adapter: Any, destination: str) -> str:
    """One line on an adapter that was written."""
    merge = adapter.merge
    tensors = adapter.encoder_weights | adapter.tuning_weights | adapter.head_weights
    size = sum(array.nbytes for array in tensors.values())
    encoder = "" if merge.encoder is None else f"D = {merge.encoder.hidden_size}, "
    return (
        f"{destination}: K = {merge.merge_factor}, {encoder}{len(tensors)} tensors, "
        f"{size / 1e6:.1f} MB, base {merge.base.id or 'not named'}"
    )
