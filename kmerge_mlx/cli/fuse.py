"""``kmerge-mlx fuse``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kmerge_mlx.cli import options as opt
from kmerge_mlx.cli.drifts import drift_lines
from kmerge_mlx.cli.reading import read_prompt
from kmerge_mlx.errors import AdapterError


def fuse(
    files: opt.DriftFiles = None,
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    k: opt.MergeFactor = None,
    save_path: Annotated[
        str, typer.Option("--save-path", help="Model folder to write.")
    ] = "fused_model",
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Write floating-point weights. Default: what is quantized is quantized again.",
        ),
    ] = False,
    force: opt.ForceModel = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
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
    text = read_prompt(files, None)[0] if files else None
    base, adapter = opt.chosen(model, adapter_path)
    if adapter is None:
        raise AdapterError(f"{base} carries no adapter to fuse: give --adapter-path")

    from kmerge_mlx.cli.output import bars
    from kmerge_mlx.tools import fuse as fusing

    done = fusing.fuse(
        base,
        adapter,
        save_path,
        k,
        dequantize=dequantize,
        text=text,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=bars(quiet=False),
    )
    kind = "quantized weights" if done.quantized else "floating-point weights"
    encoder = "no merge encoder"
    if done.merge_factor > 1:
        encoder = f"the merge encoder for K = {done.merge_factor}"
    print(f"{save_path}: {kind}, {encoder}\n{drift_lines(done.drift, bool(text))}", file=sys.stderr)
    if done.untied:
        print(
            "note: the output head had LoRA of its own, so it is no longer the embedding table: "
            "the model has an lm_head, and tie_word_embeddings is false",
            file=sys.stderr,
        )
