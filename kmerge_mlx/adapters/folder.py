"""The adapter folder: one strict way in, one atomic way out.

Owns the four files and what each holds. Does not know base models: whether an adapter fits one is
``model.py``'s question.

Format (docs/adapter-format.md): ``adapter_config.json`` and ``adapters.safetensors`` are mlx-lm's,
so mlx-lm loads the LoRA, or the layers; ``merge_config.json`` and ``merge_encoder.safetensors`` are
ours. A head LoRA that mlx-lm has no place for (tied models) is kept in the latter as
``lm_head.lora_a/b``. All four files are always there, if only with no tensor in them.
"""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from kmerge_mlx import bundled
from kmerge_mlx.adapters.lora import LORA_PARTS, dtype_problems, tensor_problems
from kmerge_mlx.adapters.schema import MergeConfig
from kmerge_mlx.adapters.tuning import LoRAConfig, Tuning, read_tuning
from kmerge_mlx.config import CARRIED, is_int
from kmerge_mlx.errors import AdapterError, findings, first_line
from kmerge_mlx.files import (
    FLOAT_DTYPES,
    check_destination,
    read_json,
    read_safetensors,
    replacing_folder,
    write_json,
    write_safetensors,
)
from kmerge_mlx.hub.fetch import fetch
from kmerge_mlx.hub.names import is_namespaced

TUNING_CONFIG = "adapter_config.json"
TUNING_WEIGHTS = "adapters.safetensors"
MERGE_CONFIG = "merge_config.json"
MERGE_WEIGHTS = "merge_encoder.safetensors"
FILES = (TUNING_CONFIG, TUNING_WEIGHTS, MERGE_CONFIG, MERGE_WEIGHTS)

HEAD = "lm_head"
ENCODER = "encoder"


@dataclass(frozen=True)
class Adapter:
    """A merge encoder and a changed base model, as loaded or as about to be saved.

    Args:
        merge: Sizes, base model, padding token, provenance.
        tuning: How the base is changed: which modules carry LoRA, or how many layers are whole.
        tuning_weights: LoRA: ``{module path}.lora_a`` (in, r) and ``.lora_b`` (r, out). Full: the
            layers' own parameters, by their names in the model.
        encoder_weights: ``w1.weight`` and so on (see ``EncoderConfig.shapes``); empty at K = 1.
        head_weights: ``lora_a`` (D, r) and ``lora_b`` (r, V) of the output head, or empty.
    """

    merge: MergeConfig
    tuning: Tuning
    tuning_weights: dict[str, mx.array]
    encoder_weights: dict[str, mx.array]
    head_weights: dict[str, mx.array] = field(default_factory=dict)


def find_adapters(path: str | Path) -> dict[int, Path]:
    """The adapters in a folder or a hub repo, by merge factor.

    Args:
        path: An adapter folder, a folder of them (``k2/``, ``k4/``), a model folder that carries
            one, a hub repo of any of these (``user/name@revision``), or ``bundled``.

    Returns:
        Merge factor to adapter folder, ascending. Of a hub repo the configs alone are there:
        :func:`adapter_folder` fetches the rest.

    Raises:
        AdapterError: Not there, no adapter (says what it is instead), or two of one K.
    """
    return _find(path)[1]


def _find(path: str | Path) -> tuple[Path, dict[int, Path]]:
    """The local folder that a path stands for, and the adapters in it."""
    try:
        root = _local(path)
        if (root / MERGE_CONFIG).is_file():
            return root, {read_merge_config(root).merge_factor: root}
        # A hidden folder is one that a killed run was still writing.
        children = root.iterdir() if root.is_dir() else ()  # a repo without any of our files
        inside = sorted(child for child in children if not child.name.startswith("."))
        folders = [child for child in inside if (child / MERGE_CONFIG).is_file()]
    except OSError as e:
        raise AdapterError(f"cannot read {path}: {e.strerror}") from None
    found: dict[int, list[Path]] = defaultdict(list)
    for folder in folders:
        found[read_merge_config(folder).merge_factor].append(folder)
    for factor, same in found.items():
        if len(same) > 1:
            names = ", ".join(folder.name for folder in same)
            raise AdapterError(
                f"{path} holds several adapters for K = {factor}: name one of {names}"
            )
    if found:
        return root, {factor: found[factor][0] for factor in sorted(found)}
    raise AdapterError(f"{path} {_what_else(root)}")


def _local(path: str | Path) -> Path:
    """The folder that a path is, or that stands for a hub repo, with its configs in it."""
    if path == bundled.BUNDLED:
        return bundled.ADAPTERS
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not is_namespaced(str(path)):
        raise AdapterError(
            f"{path} is not a folder: expected an adapter, or the name of a hub repo of one "
            "(user/name)"
        )
    patterns = [f"{at}{name}" for at in ("", "*/") for name in (MERGE_CONFIG, TUNING_CONFIG)]
    return fetch(str(path), patterns, AdapterError)


def adapter_folder(path: str | Path, k: int | None = None) -> Path:
    """The folder of one adapter.

    Args:
        path: As for :func:`find_adapters`.
        k: Merge factor wanted; None takes the only one there is (of the bundled ones, 4).

    Raises:
        AdapterError: No adapter, or no such K (lists those that are there).
    """
    if k is not None and not is_int(k, 1):
        raise AdapterError(f"k is {k!r}, expected a whole number")
    if k is None and path == bundled.BUNDLED:
        k = bundled.DEFAULT_K
    root, found = _find(path)
    have = ", ".join(str(factor) for factor in found)
    if k is None and len(found) > 1:
        raise AdapterError(f"{path} holds adapters for K = {have}: choose one with --k")
    if k is not None and k not in found:
        raise AdapterError(f"{path} holds no adapter for --k {k}: it has K = {have}")
    folder = found[next(iter(found)) if k is None else k]
    if path != bundled.BUNDLED and not Path(path).is_dir():
        # Of the same commit, which is the name of the folder that the hub's cache keeps it in.
        name = f"{str(path).partition('@')[0]}@{root.name}"
        inside = "" if folder == root else f"{glob.escape(folder.name)}/"
        fetch(name, [f"{inside}{file}" for file in FILES], AdapterError)
    return folder


def carried_by(model_folder: Path) -> Path | None:
    """The adapter that a model folder carries, as ``fuse`` and ``quantize`` write it, or None.

    Raises:
        AdapterError: It cannot be looked for.
    """
    carried = model_folder / CARRIED
    try:
        return carried if (carried / MERGE_CONFIG).is_file() else None
    except OSError as e:
        raise AdapterError(f"cannot read {carried}: {e.strerror}") from None


def base_of(path: str | Path) -> str | None:
    """The base model of an adapter, or of the first of several: the one that carries it, if any.

    Args:
        path: As for :func:`find_adapters`.

    Returns:
        A folder or a repo id, or None where the adapter does not name its base.

    Raises:
        AdapterError: No adapter.
    """
    folder = next(iter(find_adapters(path).values()))
    if folder.name == CARRIED and path != bundled.BUNDLED and not Path(path).is_dir():
        return str(path)  # a hub repo, of which only the configs are here
    if is_carried(folder):
        return str(folder.parent if folder.name == CARRIED else folder.resolve().parent)
    return read_merge_config(folder).base.id


def is_carried(folder: Path) -> bool:
    """Whether an adapter is one that the model folder around it carries."""
    folder = folder.resolve()
    return folder.name == CARRIED and (folder.parent / "config.json").is_file()


def check_not_quantized(merge: MergeConfig, what: str) -> None:
    """Refuses a quantized merge encoder, which can be read with and nothing else.

    Args:
        merge: Of the adapter.
        what: What is to be done with it: ``trained``, ``exported``.

    Raises:
        AdapterError: It is quantized.
    """
    if merge.encoder is not None and (packing := merge.encoder.quantization) is not None:
        raise AdapterError(
            f"the merge encoder is quantized to {packing.bits} bits, and cannot be {what}: take "
            "the adapter that it was made from"
        )


def load_adapter(path: str | Path, k: int | None = None) -> Adapter:
    """Reads an adapter folder.

    Args:
        path: As for :func:`find_adapters`.
        k: Merge factor wanted; None takes the only one there is.

    Returns:
        The adapter; its tensors are not evaluated yet.

    Raises:
        AdapterError: No adapter, no such K (lists those that are there), or tensors that do not
            fit the configs (all of them listed).
    """
    folder = adapter_folder(path, k)
    merge, tuning = read_merge_config(folder), _tuning(folder)
    tuning_weights = read_safetensors(folder / TUNING_WEIGHTS, AdapterError)
    quantized = merge.encoder is not None and merge.encoder.quantization is not None
    dtypes = (*FLOAT_DTYPES, "U32") if quantized else FLOAT_DTYPES
    stored = read_safetensors(folder / MERGE_WEIGHTS, AdapterError, dtypes)
    problems = [f"{TUNING_WEIGHTS}: {p}" for p in _tuning_problems(tuning, tuning_weights)]
    problems += [f"{MERGE_WEIGHTS}: {p}" for p in _merge_problems(merge, stored)]
    if problems:
        raise AdapterError(findings(str(folder), problems))
    return Adapter(merge, tuning, tuning_weights, _part(stored, ENCODER), _part(stored, HEAD))


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Writes an adapter folder, all of it or nothing.

    Args:
        adapter: What to write.
        path: The folder; replaced if it exists (see :func:`check_adapter_destination`).

    Raises:
        AdapterError: The disk is full, or the place is not writable. Nothing is left there then.
    """
    try:
        with replacing_folder(Path(path)) as folder:
            write_adapter(adapter, folder)
    except OSError as e:
        raise AdapterError(f"cannot write {path}: {e.strerror or first_line(e)}") from e


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Writes an adapter's files into a folder that its caller makes appear whole.

    Raises:
        OSError: They cannot be written.
    """
    merged = {f"{ENCODER}.{name}": array for name, array in adapter.encoder_weights.items()}
    merged |= {f"{HEAD}.{name}": array for name, array in adapter.head_weights.items()}
    tuning = adapter.tuning.to_json() | {"model": adapter.merge.base.id}
    write_json(folder / TUNING_CONFIG, tuning)
    write_safetensors(folder / TUNING_WEIGHTS, adapter.tuning_weights)
    write_json(folder / MERGE_CONFIG, adapter.merge.to_json())
    write_safetensors(folder / MERGE_WEIGHTS, merged)


def check_adapter_destination(path: str | Path, force: bool) -> None:
    """Refuses to write an adapter over something else (see :func:`files.check_destination`).

    Raises:
        AdapterError: Something is there and ``force`` is off, or it is not just an adapter folder.
    """
    check_destination(path, force, "adapter", FILES, AdapterError, marker=MERGE_CONFIG)


def read_merge_config(folder: Path) -> MergeConfig:
    """What an adapter folder says of itself; its tensors are not looked at.

    Raises:
        AdapterError: Its file cannot be read, or has a wrong entry.
    """
    try:
        return MergeConfig.from_json(read_json(folder / MERGE_CONFIG, AdapterError))
    except AdapterError as e:
        raise AdapterError(f"{folder}: {e}") from None


def _tuning(folder: Path) -> Tuning:
    try:
        return read_tuning(read_json(folder / TUNING_CONFIG, AdapterError))
    except AdapterError as e:
        raise AdapterError(f"{folder}: {e}") from None


def _part(stored: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    dotted = f"{prefix}."
    return {n.removeprefix(dotted): a for n, a in stored.items() if n.startswith(dotted)}


def _tuning_problems(tuning: Tuning, weights: Mapping[str, mx.array]) -> list[str]:
    """What can be said without a base; of whole layers, only that there are some."""
    if isinstance(tuning, LoRAConfig):
        return _lora_problems(tuning, weights)
    return [] if weights else ["found no tensors, expected the weights of whole layers"]


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
    sizes = {} if merge.encoder is None else merge.encoder.shapes()
    expected = {f"{ENCODER}.{name}": shape for name, shape in sizes.items()}
    found = {name: tuple(array.shape) for name, array in stored.items()}
    if merge.head_lora is not None:
        # V, and at K = 1 also D, is the base model's to say: only the inner sizes are known here.
        rank, a, b = merge.head_lora.rank, f"{HEAD}.lora_a", f"{HEAD}.lora_b"
        width = (merge.encoder.hidden_size,) if merge.encoder else found.get(a, ())[:1]
        expected[a] = (*(width or ("D",)), rank)
        expected[b] = (rank, *(found.get(b, ())[1:2] or ("V",)))
    packed = () if merge.encoder is None else merge.encoder.packed
    packed = {f"{ENCODER}.{name}" for name in packed}
    return tensor_problems(expected, found) + dtype_problems(stored, packed)


def _what_else(path: Path) -> str:
    """What a folder that is no adapter folder is, and what to do about it."""
    if (path / "encoder.pth").is_file() or (path / "kmerge.json").is_file():
        return f"is a PyTorch checkpoint: run `kmerge-mlx convert {path} DST` first"
    if (path / TUNING_CONFIG).is_file():
        config = read_json(path / TUNING_CONFIG, AdapterError)
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
