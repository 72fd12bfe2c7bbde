"""Writes an adapter as a checkpoint folder for PyTorch: the reverse of ``checkpoint.py``.

The copies of base weights (``base_layer``) that PEFT saves for an adapted output head are not
written: they are the base's, and PEFT loads an adapter without them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kmerge_mlx import base, bundled
from kmerge_mlx.adapters.folder import Adapter, check_not_quantized, load_adapter
from kmerge_mlx.adapters.schema import LoRAConfig
from kmerge_mlx.convert.checkpoint import (
    COMPANION,
    ENCODER,
    MAX_PROVENANCE_BYTES,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PROVENANCE,
    Companion,
    named_head,
    not_finite,
)
from kmerge_mlx.convert.encoder import encoder_to_torch
from kmerge_mlx.convert.peft import place
from kmerge_mlx.convert.peft_write import lora_to_peft
from kmerge_mlx.convert.torch_write import write_state_dict
from kmerge_mlx.errors import AdapterError, CheckpointError, findings, first_line
from kmerge_mlx.files import check_destination, replacing_folder, write_json, write_safetensors

FILES = (ENCODER, PEFT_CONFIG, PEFT_WEIGHTS[0], COMPANION, *PROVENANCE)


def export_adapter(
    source: str | Path, destination: str | Path, k: int | None = None, force: bool = False
) -> Adapter:
    """Writes an adapter as the paper's code and PEFT read it; ``convert`` brings it back.

    Tensors keep their dtypes and bits, and the same adapter gives the same bytes. An adapter with
    K = 1 has no encoder, and gets no ``encoder.pth``.

    Args:
        source: An adapter folder, a folder of them, or ``bundled``.
        destination: The folder to write, whole or not at all.
        k: Merge factor wanted; None takes the only one there is.
        force: Replace an exported adapter at ``destination``.

    Returns:
        What was written.

    Raises:
        AdapterError: The adapter cannot be read, or has no equal in PyTorch (all reasons listed).
        CheckpointError: The destination exists, or cannot be written. Nothing is left there then.
    """
    check_destination(
        destination, force, "exported adapter", FILES, CheckpointError, marker=COMPANION
    )
    adapter = load_adapter(source, k)
    if problems := _objections(adapter):
        raise AdapterError(findings(f"{source} cannot be exported", problems))
    try:
        with replacing_folder(Path(destination)) as folder:
            _write(adapter, folder)
    except OSError as e:
        reason = e.strerror or first_line(e)
        raise CheckpointError(f"cannot write {destination}: {reason}") from e
    return adapter


def _objections(adapter: Adapter) -> list[str]:
    """Why an adapter means nothing to PEFT or to the paper's code, one line each."""
    merge, weights = adapter.merge, adapter.tuning_weights
    check_not_quantized(merge, "exported")
    problems = not_finite(adapter.encoder_weights | weights | named_head(adapter.head_weights))
    if not isinstance(adapter.tuning, LoRAConfig):
        return [*problems, "full fine-tuning is not LoRA: `kmerge-mlx fuse` writes a whole model"]
    if merge.encoder is not None and (context := merge.encoder.context):
        problems.append(
            f"its encoder also reads the {context} tokens before a block, which the paper's "
            "code does not: train it without --encoder-context"
        )
    if merge.encoder is not None and base.scales_embeddings(merge.base.fields):
        problems.append(
            "its base scales embeddings inside the model, and the paper's code feeds it unscaled "
            "ones (docs/method.md, Gemma): there is no equal"
        )
    if not weights and not adapter.head_weights and merge.encoder is not None:
        problems.append(
            "it has no LoRA: `kmerge-mlx fuse` put it into the model's weights; export the adapter "
            "that it was made from"
        )
    if named_head(adapter.head_weights).keys() & weights.keys():
        problems.append("lm_head has two LoRAs, one beside the encoder")
    homeless = {}
    for name, array in weights.items():
        module = name.rpartition(".")[0]
        last = module.rpartition(".")[2]
        if array.ndim == 3:
            homeless[place(module)[2]] = "experts"
        elif "embed" in last or last in ("wte", "wpe"):
            homeless[module] = "the embedding table"
    return problems + [
        f"{name} is LoRA on {what}, for which PEFT's files have no place: train it with other "
        "lora_parameters.keys"
        for name, what in sorted(homeless.items())
    ]


def _base_model(adapter: Adapter) -> str | None:
    """The base as PEFT is to call it: a folder that can be found from anywhere, or a repo id."""
    name = adapter.merge.base.id
    if name == bundled.BUNDLED:
        return str(bundled.BASE)
    try:
        return str(Path(name).resolve()) if name and Path(name).is_dir() else name
    except OSError:  # no disk has such a name
        return name


def _write(adapter: Adapter, folder: Path) -> None:
    config, tensors, scales = lora_to_peft(adapter, _base_model(adapter))
    write_json(folder / PEFT_CONFIG, config)
    write_safetensors(folder / PEFT_WEIGHTS[0], tensors, "pt")
    if adapter.encoder_weights:
        write_state_dict(folder / ENCODER, encoder_to_torch(adapter.encoder_weights))
    provenance = dict(adapter.merge.provenance)
    for name in PROVENANCE:
        content: Any = provenance.get(name.removesuffix(".json"))
        if isinstance(content, dict):
            write_json(folder / name, content)
            # Past this, `convert` would not take it from there.
            if (folder / name).stat().st_size <= MAX_PROVENANCE_BYTES:
                del provenance[name.removesuffix(".json")]
    merge = replace(adapter.merge, provenance=provenance)
    write_json(folder / COMPANION, Companion(merge, scales).to_json())
