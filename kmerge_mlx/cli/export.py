"""``kmerge-mlx export``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kmerge_mlx.cli import options as opt


def export(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Adapter folder, or a folder of several K.")
    ],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Folder to write.")],
    k: opt.MergeFactor = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an exported adapter at DST.")
    ] = False,
) -> None:
    """Turn an adapter folder back into a PyTorch checkpoint.

    DST gets encoder.pth, a PEFT LoRA, and kmerge.json for what those cannot say: the paper's code
    and PEFT load it, and `kmerge-mlx convert` gives the same adapter again, bit for bit. Needs no
    PyTorch. DST is written whole or not at all.

    \b
    Examples:
      kmerge-mlx export ./adapter ./checkpoint
      kmerge-mlx export ./adapters ./checkpoint --k 4 --force
    """
    from kmerge_mlx.convert.export import export_adapter
    from kmerge_mlx.prompts.policy import ALL

    adapter = export_adapter(source, destination, k, force)
    merge = adapter.merge
    tensors = adapter.encoder_weights | adapter.tuning_weights | adapter.head_weights
    size = sum(array.nbytes for array in tensors.values())
    print(
        f"{destination}: K = {merge.merge_factor}, {len(tensors)} tensors, {size / 1e6:.1f} MB, "
        f"base {merge.base.id or 'not named'}",
        file=sys.stderr,
    )
    if merge.encoder is None:
        print("note: K = 1 merges nothing: there is no encoder.pth", file=sys.stderr)
    elif merge.layout is not None and (merge.layout.merges != ALL or merge.layout.chat_template):
        print(
            "note: the paper's code merges the whole prompt and applies no chat template; "
            "kmerge.json says how this adapter was trained",
            file=sys.stderr,
        )
