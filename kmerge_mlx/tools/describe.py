"""What a folder holds, as plain data: an adapter, a PyTorch checkpoint or a base model.

Owns the questions that ``kmerge-mlx info`` answers; the CLI only lays the answers out. Of adapters
and base models it reads headers and configs only; a checkpoint is read whole, as if to convert it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import (
    FILES,
    MERGE_CONFIG,
    Adapter,
    carried_by,
    find_adapters,
    load_adapter,
)
from kmerge_mlx.adapters.tuning import LoRAConfig
from kmerge_mlx.convert.checkpoint import (
    COMPANION,
    ENCODER,
    FETCHED,
    find_checkpoint,
    read_checkpoint,
)
from kmerge_mlx.errors import AdapterError, DataError
from kmerge_mlx.hub.fetch import fetch, is_namespaced
from kmerge_mlx.train.checkpoint import BEST, STATE, TRAINING, read_log, read_progress

PATTERNS = ("config.json", *(f"{at}{name}" for at in ("", "*/") for name in {*FILES, *FETCHED}))


def describe(path: str | Path) -> dict[str, Any]:
    """Says what a folder or a hub repo is and holds.

    Args:
        path: A folder, or ``user/name@revision``; a base model's weights are left there.

    Returns:
        ``kind`` (``adapter``, ``checkpoint``, ``base model`` or ``model with its adapter``) and its
        facts, all JSON-ready; sizes in bytes.

    Raises:
        KMergeError: Nothing this project knows, or a torn one.
    """
    try:
        return _describe(_local(path)) | {"path": str(path)}
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from None


def _local(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not is_namespaced(str(path)):
        raise AdapterError(f"{path} is not a folder, nor the name of a hub repo (user/name)")
    folder = fetch(str(path), PATTERNS, AdapterError)
    if not folder.is_dir():
        raise AdapterError(f"{path} holds no adapter, no checkpoint and no base model")
    return folder


def _describe(path: Path) -> dict[str, Any]:
    if (carried := carried_by(path)) is not None and (path / "config.json").is_file():
        found = {"kind": "model with its adapter"} | _base(path)
        return found | {"adapters": [describe_adapter(load_adapter(carried), carried)]}
    if not _holds(path, MERGE_CONFIG) or (path / ENCODER).is_file():
        if _holds(path, ENCODER) or (path / COMPANION).is_file():
            folder = find_checkpoint(str(path))
            adapter = read_checkpoint(folder, None, None, str(path))
            return {"kind": "checkpoint", "adapters": [describe_adapter(adapter, folder)]}
        if (path / "config.json").is_file():
            return {"kind": "base model"} | _base(path)
    adapters = [
        describe_adapter(load_adapter(path, k), at) for k, at in find_adapters(path).items()
    ]
    return {"kind": "adapter", "adapters": adapters}


def _holds(path: Path, name: str) -> bool:
    """Whether a file of that name is in a folder, or in one right below it."""
    return (path / name).is_file() or any(path.glob(f"*/{name}"))


def describe_adapter(adapter: Adapter, folder: Path | None = None) -> dict[str, Any]:
    """The facts of one adapter, and of the run in its folder, all JSON-ready; sizes in bytes."""
    merge, tuning, encoder = adapter.merge, adapter.tuning, adapter.encoder_weights
    return {
        **merge.encoder_entries(),
        "encoder_parameters": 0 if merge.encoder is None else merge.encoder.num_parameters,
        "encoder_bytes": _bytes(encoder),
        "dtype": ", ".join(sorted(_dtypes(adapter))),
        "fine_tune_type": tuning.to_json()["fine_tune_type"],
        "num_layers": tuning.num_layers,
        **_lora(adapter),
        **_full(adapter),
        "base_model": merge.base.id,
        "base_config": dict(merge.base.fields),
        "base_config_hash": merge.base.config_hash,
        "pad_token_id": merge.pad_token_id,
        "layout": None if merge.layout is None else asdict(merge.layout),
        "provenance": dict(merge.provenance),
        "training": None if folder is None else _training(folder),
    }


def _training(folder: Path) -> dict[str, Any] | None:
    """How far the run in a folder came, and the figures of its best validation; None without."""
    folder = folder.parent if folder.name == BEST else folder
    if not (folder / TRAINING / STATE).is_file():
        return None
    state = read_progress(folder)
    best: dict[str, Any] = {}
    # A run that was killed may have left a torn last line, which a resumed one drops.
    with suppress(DataError):
        for record in read_log(folder / TRAINING):
            if record.get("iteration") == state.best_iteration and "val_loss" in record:
                best = record
    return {"iteration": state.iteration, "finished": state.finished, "best": best or None}


def _lora(adapter: Adapter) -> dict[str, Any]:
    """LoRA modules, the output head's included, which full fine-tuning may have as well."""
    tuning, head = adapter.tuning, adapter.merge.head_lora
    specs, weights, modules = {head}, adapter.head_weights, set()
    if isinstance(tuning, LoRAConfig):
        specs |= {tuning.uniform} if tuning.uniform else set(tuning.modules.values())
        weights = weights | adapter.tuning_weights
        modules = {name.rsplit(".", 1)[0] for name in adapter.tuning_weights}
    return {
        "lora_modules": len(modules) + (head is not None),
        "lora_ranks": sorted({s.rank for s in specs if s}),
        "lora_scales": sorted({s.scale for s in specs if s}),
        "lora_bytes": _bytes(weights),
    }


def _full(adapter: Adapter) -> dict[str, int]:
    weights = {} if isinstance(adapter.tuning, LoRAConfig) else adapter.tuning_weights
    return {
        "full_parameters": sum(array.size for array in weights.values()),
        "full_bytes": _bytes(weights),
    }


def _base(path: Path) -> dict[str, Any]:
    config = base.read_config(path)
    fields = base.fingerprint(config)
    quantization = config.get("quantization") or {}
    return {
        "config": fields,
        "context_length": base.context_length(config),
        "quantization_bits": quantization.get("bits") if isinstance(quantization, dict) else None,
        "proven_by_tests": fields.get("model_type") in base.PROVEN,
    }


def _bytes(tensors: dict[str, mx.array]) -> int:
    return sum(array.nbytes for array in tensors.values())


def _dtypes(adapter: Adapter) -> set[str]:
    """Of the encoder's numbers; of packed ones, what they are unpacked to."""
    encoder = adapter.merge.encoder
    packed = () if encoder is None else encoder.packed
    numbers = [a for name, a in adapter.encoder_weights.items() if name not in packed]
    return {base.dtype_name(array.dtype) for array in numbers}
