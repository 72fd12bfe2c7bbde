"""The adapter folder: one strict way in, one atomic way out.

Owns the four files and what each holds. Does not know base models: whether an adapter fits one is
``model.py``'s question.

Format (docs/adapter-format.md): ``adapter_config.json`` and ``adapters.safetensors`` are mlx-lm's,
so mlx-lm loads the LoRA; ``merge_config.json`` and ``merge_encoder.safetensors`` are ours. A head
LoRA that mlx-lm has no place for (tied models) is kept in the latter as ``lm_head.lora_a/b``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from kmerge_mlx.config import LoRAConfig, MergeConfig, is_int
from kmerge_mlx.errors import AdapterError, findings, first_line
from kmerge_mlx.files import (
    check_destination,
    read_json,
    read_safetensors,
    replacing_folder,
    write_json,
    write_safetensors,
)
from kmerge_mlx.lora import tensor_problems

LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapters.safetensors"
MERGE_CONFIG = "merge_config.json"
MERGE_WEIGHTS = "merge_encoder.safetensors"
FILES = (LORA_CONFIG, LORA_WEIGHTS, MERGE_CONFIG, MERGE_WEIGHTS)

HEAD = "lm_head"
ENCODER = "encoder"
LORA_PARTS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class Adapter:
    """A merge encoder and a LoRA, as loaded or as about to be saved.

    Args:
        merge: Sizes, base model, padding token, provenance.
        lora: Which modules carry LoRA.
        lora_weights: ``{module path}.lora_a`` (in, r) and ``.lora_b`` (r, out).
        encoder_weights: ``w1.weight`` and so on (see ``EncoderConfig.shapes``).
        head_weights: ``lora_a`` (D, r) and ``lora_b`` (r, V) of the output head, or empty.
    """

    merge: MergeConfig
    lora: LoRAConfig
    lora_weights: dict[str, mx.array]
    encoder_weights: dict[str, mx.array]
    head_weights: dict[str, mx.array] = field(default_factory=dict)


def find_adapters(path: str | Path) -> dict[int, Path]:
    """The adapters in a folder, by merge factor.

    Args:
        path: An adapter folder, or a folder of them (``k2/``, ``k4/``).

    Returns:
        Merge factor to adapter folder, ascending.

    Raises:
        AdapterError: Not there, no adapter (says what it is instead), or two of one K.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            raise AdapterError(f"{path} is not a folder: --adapter-path takes a converted adapter")
        if (path / MERGE_CONFIG).is_file():
            return {_merge_config(path).encoder.merge_factor: path}
        # A hidden folder is one that a killed run was still writing.
        inside = sorted(child for child in path.iterdir() if not child.name.startswith("."))
        folders = [child for child in inside if (child / MERGE_CONFIG).is_file()]
    except OSError as e:
        raise AdapterError(f"cannot read {path}: {e.strerror}") from None
    found: dict[int, list[Path]] = defaultdict(list)
    for folder in folders:
        found[_merge_config(folder).encoder.merge_factor].append(folder)
    for factor, same in found.items():
        if len(same) > 1:
            names = ", ".join(folder.name for folder in same)
            raise AdapterError(
                f"{path} holds several adapters for K = {factor}: name one of {names}"
            )
    if found:
        return {factor: found[factor][0] for factor in sorted(found)}
    raise AdapterError(f"{path} {_what_else(path)}")


def load_adapter(path: str | Path, k: int | None = None) -> Adapter:
    """Reads an adapter folder.

    Args:
        path: An adapter folder, or a folder of them.
        k: Merge factor wanted; None takes the only one there is.

    Returns:
        The adapter; its tensors are not evaluated yet.

    Raises:
        AdapterError: No adapter, no such K (lists those that are there), or tensors that do not
            fit the configs (all of them listed).
    """
    if k is not None and not is_int(k, 1):
        raise AdapterError(f"k is {k!r}, expected a whole number")
    found = find_adapters(path)
    have = ", ".join(str(factor) for factor in found)
    if k is None and len(found) > 1:
        raise AdapterError(f"{path} holds adapters for K = {have}: choose one with --k")
    if k is not None and k not in found:
        raise AdapterError(f"{path} holds no adapter for --k {k}: it has K = {have}")
    folder = found[next(iter(found)) if k is None else k]
    merge, lora = _merge_config(folder), _lora_config(folder)
    lora_weights = read_safetensors(folder / LORA_WEIGHTS, AdapterError)
    stored = read_safetensors(folder / MERGE_WEIGHTS, AdapterError)
    problems = [f"{LORA_WEIGHTS}: {p}" for p in _lora_problems(lora, lora_weights)]
    problems += [f"{MERGE_WEIGHTS}: {p}" for p in _merge_problems(merge, stored)]
    if problems:
        raise AdapterError(findings(str(folder), problems))
    return Adapter(merge, lora, lora_weights, _part(stored, ENCODER), _part(stored, HEAD))


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Writes an adapter folder, all of it or nothing.

    Args:
        adapter: What to write.
        path: The folder; replaced if it exists (see :func:`check_adapter_destination`).

    Raises:
        AdapterError: The disk is full, or the place is not writable. Nothing is left there then.
    """
    merged = {f"{ENCODER}.{name}": array for name, array in adapter.encoder_weights.items()}
    merged |= {f"{HEAD}.{name}": array for name, array in adapter.head_weights.items()}
    try:
        with replacing_folder(Path(path)) as folder:
            lora = adapter.lora.to_json() | {"model": adapter.merge.base.id}
            write_json(folder / LORA_CONFIG, lora)
            write_safetensors(folder / LORA_WEIGHTS, adapter.lora_weights)
            write_json(folder / MERGE_CONFIG, adapter.merge.to_json())
            write_safetensors(folder / MERGE_WEIGHTS, merged)
    except OSError as e:
        raise AdapterError(f"cannot write {path}: {e.strerror or first_line(e)}") from e


def check_adapter_destination(path: str | Path, force: bool) -> None:
    """Refuses to write an adapter over something else (see :func:`files.check_destination`).

    Raises:
        AdapterError: Something is there and ``force`` is off, or it is not just an adapter folder.
    """
    check_destination(path, force, "adapter", FILES, AdapterError, marker=MERGE_CONFIG)


def _merge_config(folder: Path) -> MergeConfig:
    try:
        return MergeConfig.from_json(read_json(folder / MERGE_CONFIG, AdapterError))
    except AdapterError as e:
        raise AdapterError(f"{folder}: {e}") from None


def _lora_config(folder: Path) -> LoRAConfig:
    try:
        return LoRAConfig.from_json(read_json(folder / LORA_CONFIG, AdapterError))
    except AdapterError as e:
        raise AdapterError(f"{folder}: {e}") from None


def _part(stored: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    dotted = f"{prefix}."
    return {n.removeprefix(dotted): a for n, a in stored.items() if n.startswith(dotted)}


def _lora_problems(config: LoRAConfig, weights: Mapping[str, mx.array]) -> list[str]:
    """What can be said of the LoRA without a base: which tensors there are, and their ranks."""
    problems, keys = [], set(config.keys)
    found: dict[str, dict[str, mx.array]] = {name: {} for name in config.modules}
    used: set[str] = set()
    for name, array in weights.items():
        module, _, part = name.rpartition(".")
        hit = keys & name_ends(module)
        if part not in LORA_PARTS or not (hit or module in config.modules):
            problems.append(f"{name} {tuple(array.shape)} belongs to nothing here")
            continue
        used |= hit
        found.setdefault(module, {})[part] = array
    problems += [f"key {key} has no tensors" for key in config.keys if key not in used]
    for module, parts in found.items():
        absent = [part for part in LORA_PARTS if part not in parts]
        problems += [f"{module}.{part} is missing" for part in absent]
        rank = (config.uniform or config.modules[module]).rank
        if not absent and not _have_rank(*(parts[part] for part in LORA_PARTS), rank):
            shapes = " and ".join(f"{part} {tuple(parts[part].shape)}" for part in LORA_PARTS)
            problems.append(f"{module} has {shapes}, expected (in, {rank}) and ({rank}, out)")
    return problems


def _have_rank(a: mx.array, b: mx.array, rank: int) -> bool:
    if a.ndim == b.ndim == 3:  # mlx-lm's experts: (experts, r, in) and (experts, out, r)
        return a.shape[1] == b.shape[2] == rank
    return a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] == rank


def name_ends(module: str) -> set[str]:
    """A module's path, and every part of it after a dot: what a suffix may name it by."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _merge_problems(merge: MergeConfig, stored: Mapping[str, mx.array]) -> list[str]:
    expected = {f"{ENCODER}.{name}": shape for name, shape in merge.encoder.shapes().items()}
    found = {name: tuple(array.shape) for name, array in stored.items()}
    if merge.head_lora is not None:
        # The vocabulary is the base model's to say: only the inner sizes are known here.
        rank, vocab_size = merge.head_lora.rank, found.get(f"{HEAD}.lora_b", ())[1:2]
        expected[f"{HEAD}.lora_a"] = (merge.encoder.hidden_size, rank)
        expected[f"{HEAD}.lora_b"] = (rank, *(vocab_size or ("V",)))
    return tensor_problems(expected, found)


def _what_else(path: Path) -> str:
    """What a folder that is no adapter folder is, and what to do about it."""
    if (path / "encoder.pth").is_file():
        return f"is a PyTorch checkpoint: run `kmerge-mlx convert {path} DST` first"
    if (path / LORA_CONFIG).is_file():
        config = read_json(path / LORA_CONFIG, AdapterError)
        if isinstance(config, dict) and "peft_type" in config:
            return "is a PEFT adapter without a merge encoder: convert the whole checkpoint folder"
        return (
            f"is an mlx-lm adapter without a merge encoder ({MERGE_CONFIG} is missing): "
            "use mlx_lm.generate for it, or an adapter made by `kmerge-mlx convert`"
        )
    if any(path.glob("*/encoder.pth")):
        return f"holds PyTorch checkpoints: run `kmerge-mlx convert {path} DST` first"
    if (path / "config.json").is_file():
        return "is a base model, not an adapter: give it as --model"
    return f"is no adapter folder: {MERGE_CONFIG} is missing"
