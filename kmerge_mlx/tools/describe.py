"""Says what a folder or a hub repo holds: an adapter, a PyTorch checkpoint or a base model."""

from __future__ import annotations

import re
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import (
    FILES,
    LCLM_CONFIGS,
    MERGE_CONFIG,
    Adapter,
    carried_by,
    load_adapter,
    look_up,
    read_adapter,
)
from kmerge_mlx.adapters.schema import QUANTIZATION, START, LoRAConfig
from kmerge_mlx.adapters.window import ENTRY as WINDOW
from kmerge_mlx.convert import checkpoint
from kmerge_mlx.errors import AdapterError, DataError
from kmerge_mlx.files import ALL_DTYPES, read_safetensors
from kmerge_mlx.hub import fetch, is_namespaced
from kmerge_mlx.prompts.policy import ALL
from kmerge_mlx.train.checkpoint import BEST, FOLDERS, STATE, TRAINING, read_log, read_progress

_NAMES = {*FILES, *checkpoint.FETCHED}
PATTERNS = ("config.json", *LCLM_CONFIGS, *(f"{at}{name}" for at in ("", "*/") for name in _NAMES))


def describe(path: str | Path) -> dict[str, Any]:
    """Says what a folder or a hub repo is and holds; a base model's weights are not fetched.

    Returns its ``kind`` (``adapter``, ``checkpoint``, ``base model`` or ``model with its adapter``)
    and its facts, all JSON-ready; sizes in bytes.
    """
    name, folder = str(path), Path(path)
    try:
        if not folder.is_dir():
            if folder.exists() or not is_namespaced(name):
                raise AdapterError(f"{name} is not a folder, and not a hub repo id (user/name)")
            folder = fetch(name, PATTERNS, AdapterError)
            if not folder.is_dir():
                raise AdapterError(f"{name} holds no adapter, no checkpoint and no base model")
        return _describe(folder, name) | {"path": name}
    except OSError as error:
        raise AdapterError(f"cannot read {name}: {error.strerror}") from None


def _describe(path: Path, name: str) -> dict[str, Any]:
    has_config = (path / "config.json").is_file()
    if has_config and (carried := carried_by(path)) is not None:
        found = {"kind": "model with its adapter"} | _base(path)
        return found | {"adapters": [describe_adapter(load_adapter(carried), carried)]}
    encoder, companion = checkpoint.ENCODER, checkpoint.COMPANION
    if not _holds(path, MERGE_CONFIG) or (path / encoder).is_file():
        if _holds(path, encoder) or (path / companion).is_file():
            folder = checkpoint.find_checkpoint(str(path))
            adapter = checkpoint.read_checkpoint(folder, None, None, name)
            return {"kind": "checkpoint", "adapters": [describe_adapter(adapter, folder)]}
        if has_config:
            return {"kind": "base model"} | _base(path)
    found = look_up(path).found.values()
    adapters = [describe_adapter(read_adapter(at, merge), at) for at, merge in found]
    return {"kind": "adapter", "adapters": adapters}


def _holds(path: Path, name: str) -> bool:
    """Whether a file of that name is in a folder, or in one right below it."""
    return (path / name).is_file() or any(path.glob(f"*/{name}"))


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


def describe_adapter(adapter: Adapter, folder: Path | None = None) -> dict[str, Any]:
    """The facts of an adapter, and of the training run in its folder; sizes in bytes."""
    merge, tuning, encoder = adapter.merge, adapter.tuning, adapter.encoder_weights
    whole, lora, specs = adapter.tuning_weights, {}, []
    if isinstance(tuning, LoRAConfig):
        whole, lora = {}, whole
        specs = [tuning.uniform] if tuning.uniform else [*tuning.modules.values()]
    modules = {name.rpartition(".")[0] for name in lora}
    specs += [merge.head_lora] if merge.head_lora else []
    lora = lora | adapter.head_weights
    packed = () if merge.encoder is None else merge.encoder.packed
    parameters, size = 0 if merge.encoder is None else merge.encoder.num_parameters, 0
    if adapter.encoder_folder is not None:
        own, size = window_sizes(adapter.encoder_folder)
        parameters += own
    dtypes = {base.dtype_name(a.dtype) for name, a in encoder.items() if name not in packed}
    return {
        **merge.encoder_entries(),
        "encoder_parameters": parameters,
        "encoder_bytes": size + sum(array.nbytes for array in encoder.values()),
        "dtype": ", ".join(sorted(dtypes)),
        "fine_tune_type": tuning.to_json()["fine_tune_type"],
        "num_layers": tuning.num_layers,
        "lora_modules": len(modules) + (merge.head_lora is not None),
        "lora_ranks": sorted({spec.rank for spec in specs}),
        "lora_scales": sorted({spec.scale for spec in specs}),
        "lora_bytes": sum(array.nbytes for array in lora.values()),
        "full_parameters": sum(array.size for array in whole.values()),
        "full_bytes": sum(array.nbytes for array in whole.values()),
        "base_model": merge.base.id,
        "base_config": dict(merge.base.fields),
        "base_config_hash": merge.base.config_hash,
        "pad_token_id": merge.pad_token_id,
        "layout": None if merge.layout is None else merge.layout.to_json(),
        "provenance": dict(merge.provenance),
        "training": None if folder is None else _training(folder, merge.merge_factor),
    }


def window_sizes(folder: Path) -> tuple[int, int]:
    """Parameters and bytes of a window encoder's language model, from its headers."""
    config = base.read_config(folder)
    bits = (config.get("quantization") or {}).get("bits")
    parameters = size = 0
    for file in sorted(folder.glob("model*.safetensors")):
        for name, array in read_safetensors(file, AdapterError, ALL_DTYPES).items():
            size += array.nbytes
            if array.dtype == mx.uint32 and bits:
                parameters += array.size * 32 // bits
            elif not name.endswith((".scales", ".biases")):
                parameters += array.size
    return parameters, size


def _training(folder: Path, k: int) -> dict[str, Any] | None:
    """How far the run in a folder came, and the figures of its best validation; None without."""
    if fnmatch(folder.name, FOLDERS) and not (folder / TRAINING).is_dir():  # of a run for several K
        folder = folder.parent
    folder = folder.parent if folder.name == BEST else folder
    if not (folder / TRAINING / STATE).is_file():
        return None
    state = read_progress(folder)
    best: dict[str, Any] = {}
    with suppress(DataError):  # a killed run may have left a torn last line
        for record in read_log(folder / TRAINING):
            if record.get("iteration") == state.best_iteration and "val_loss" in record:
                best = record
    others = re.compile(rf"_k(?!{k}$)\d+$")  # figures of the run's other K
    best = {name: value for name, value in best.items() if not others.search(name)}
    return {"iteration": state.iteration, "finished": state.finished, "best": best or None}


def encoder_line(adapter: dict[str, Any]) -> str:
    """An adapter's encoder in words, from :func:`describe_adapter`'s facts."""
    if adapter["merge_factor"] == 1:
        return "none: nothing is merged"
    if (own := adapter.get(WINDOW)) is not None:
        megabytes = f"{adapter['encoder_bytes'] / 1e6:.1f} MB"
        before = f" and {own['overlap']} before them" if own["overlap"] else ""
        return (
            f"windows of {own['window']:,} tokens{before}, {own['pooling']} of each "
            f"{own['merge_factor']}, E = {own['encoder_size']}, D = {own['hidden_size']}, "
            f"{adapter['encoder_parameters']:,} parameters, {megabytes}"
        )
    context, packing = adapter["encoder_context"], adapter.get(QUANTIZATION)
    sizes = f"D = {adapter['hidden_size']}, H = {adapter['inner_size']}, "
    sizes += f"{context} tokens of context, " if context else ""
    sizes += f"starts from {adapter[START]}, " if START in adapter else ""
    numbers = f"at {packing['bits']} bits" if packing else adapter["dtype"]
    megabytes = f"{adapter['encoder_bytes'] / 1e6:.1f} MB"
    return f"{sizes}{adapter['encoder_parameters']:,} parameters, {megabytes} {numbers}"


def tuning_lines(adapter: dict[str, Any]) -> dict[str, str]:
    """How the base is changed, in words: ``full`` or ``LoRA``, or both (the head)."""
    rows, layers = {}, adapter["num_layers"]
    if adapter["full_bytes"]:
        rows["full"] = (
            f"{f'last {layers}' if layers > 0 else 'all'} layers, "
            f"{adapter['full_parameters']:,} parameters, {adapter['full_bytes'] / 1e6:.1f} MB"
        )
    if adapter["lora_modules"]:
        ranks, scales = (
            ", ".join(f"{value:g}" for value in adapter[f"lora_{name}"]) or "none"
            for name in ("ranks", "scales")
        )
        rows["LoRA"] = (
            f"{adapter['lora_modules']} modules, rank {ranks}, scale {scales}, "
            f"{adapter['lora_bytes'] / 1e6:.1f} MB"
        )
    return rows or {"LoRA": "none"}


def layout_line(adapter: dict[str, Any]) -> str | None:
    """How prompts were laid out in training, in words; None where that was not recorded."""
    if (layout := adapter["layout"]) is None:
        return None
    merges = "everything merges"
    if layout["merges"] != ALL:
        merges = f"{layout['merges']} of {layout['threshold']} tokens and more merge"
    kept = f" but {', '.join(layout['keep'])}" if layout.get("keep") else ""
    return f"{merges}{kept}, {'with' if layout['chat_template'] else 'without'} a chat template"
