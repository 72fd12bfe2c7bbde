"""``kmerge-mlx convert``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kmerge_mlx.cli import options as opt


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Checkpoint folder, or hub repo id (user/name@revision)."
        ),
    ],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Adapter folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Base model, a folder or repo id: checks the fit and records what it says.",
            show_default=False,
        ),
    ] = None,
    k: opt.MergeFactor = None,
    dtype: Annotated[
        opt.Dtype | None,
        typer.Option("--dtype", help="Cast the weights. Default: keep.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter at DST.")] = False,
) -> None:
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

    adapter = convert_checkpoint(source, destination, model, k, dtype, force)
    merge = adapter.merge
    encoder = "" if merge.encoder is None else f"D = {merge.encoder.hidden_size}, "
    tensors = adapter.encoder_weights | adapter.tuning_weights | adapter.head_weights
    size = sum(array.nbytes for array in tensors.values())
    print(
        f"{destination}: K = {merge.merge_factor}, {encoder}"
        f"{len(tensors)} tensors, {size / 1e6:.1f} MB, "
        f"base {merge.base.id or 'not named'}",
        file=sys.stderr,
    )
    if model is None and not merge.base.fields:
        print(
            "note: without --model, only sizes tell a wrong base when the adapter is loaded",
            file=sys.stderr,
        )
