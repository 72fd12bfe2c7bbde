"""What a folder holds, as plain data: an adapter, a PyTorch checkpoint or a base model.

Owns the questions that ``kmerge-mlx info`` answers; the CLI only lays the answers out. Of adapters
and base models it reads headers and configs only; a checkpoint is read whole, as if to convert it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from kmerge_mlx import base
from kmerge_mlx.adapter import MERGE_CONFIG, Adapter, find_adapters, load_adapter
from kmerge_mlx.convert.checkpoint import ENCODER, find_checkpoint, read_checkpoint
from kmerge_mlx.errors import AdapterError


def describe(path: str | Path) -> dict[str, Any]:
    """Says what a folder is and holds.

    Args:
        path: A folder.

    Returns:
        ``kind`` (``adapter``, ``checkpoint`` or ``base model``) and its facts, all JSON-ready;
        sizes in bytes.

    Raises:
        KMergeError: Nothing this project knows, or a torn one.
    """
    path = Path(path)
    try:
        return _describe(path)
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from None


def _describe(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise AdapterError(f"{path} is not a folder")
    if not _holds(path, MERGE_CONFIG) or (path / ENCODER).is_file():
        if _holds(path, ENCODER):
            adapter = read_checkpoint(find_checkpoint(str(path)), None, None, str(path))
            return {"kind": "checkpoint", "path": str(path), "adapters": [_adapter(adapter)]}
        if (path / "config.json").is_file():
            return {"kind": "base model", "path": str(path)} | _base(path)
    adapters = [_adapter(load_adapter(path, k)) for k in find_adapters(path)]
    return {"kind": "adapter", "path": str(path), "adapters": adapters}


def _holds(path: Path, name: str) -> bool:
    """Whether a file of that name is in a folder, or in one right below it."""
    return (path / name).is_file() or any(path.glob(f"*/{name}"))


def _adapter(adapter: Adapter) -> dict[str, Any]:
    merge, lora = adapter.merge, adapter.lora
    specs = {lora.uniform} if lora.uniform else set(lora.modules.values())
    modules = {name.rsplit(".", 1)[0] for name in adapter.lora_weights}
    return {
        "merge_factor": merge.encoder.merge_factor,
        "hidden_size": merge.encoder.hidden_size,
        "inner_size": merge.encoder.inner_size,
        "encoder_parameters": merge.encoder.num_parameters,
        "encoder_bytes": _bytes(adapter.encoder_weights),
        "dtype": ", ".join(sorted({_dtype(a) for a in adapter.encoder_weights.values()})),
        "lora_modules": len(modules) + (merge.head_lora is not None),
        "lora_ranks": sorted({s.rank for s in specs if s} | _head(merge.head_lora, "rank")),
        "lora_scales": sorted({s.scale for s in specs if s} | _head(merge.head_lora, "scale")),
        "lora_bytes": _bytes(adapter.lora_weights) + _bytes(adapter.head_weights),
        "base_model": merge.base.id,
        "base_config": dict(merge.base.fields),
        "base_config_hash": merge.base.config_hash,
        "pad_token_id": merge.pad_token_id,
        "layout": dict(merge.layout),
        "provenance": dict(merge.provenance),
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


def _head(spec: Any, name: str) -> set[Any]:
    return set() if spec is None else {getattr(spec, name)}


def _bytes(tensors: dict[str, mx.array]) -> int:
    return sum(array.nbytes for array in tensors.values())


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")
