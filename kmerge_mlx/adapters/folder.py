"""Finds, reads and writes adapter folders: merge_config.json and the three files beside it.

Format (docs/adapter-format.md): ``adapter_config.json`` and ``adapters.safetensors`` are mlx-lm's,
so mlx-lm loads the LoRA, or the layers; ``merge_config.json`` and ``merge_encoder.safetensors`` are
ours. The latter also holds the output head's LoRA of tied models (``lm_head.lora_a/b``), which
mlx-lm has nowhere to put. All four files are always there, if only with no tensor in them.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from kmerge_mlx import bundled
from kmerge_mlx.adapters.lora import LORA_PARTS, tensor_problems
from kmerge_mlx.adapters.portable import found_id, portable
from kmerge_mlx.adapters.schema import LoRAConfig, MergeConfig, Tuning, read_tuning
from kmerge_mlx.config import CARRIED
from kmerge_mlx.errors import AdapterError, findings, first_line
from kmerge_mlx.files import (
    FLOAT_DTYPES,
    check_destination,
    flush,
    read_json,
    read_safetensors,
    replacing_folder,
    settled,
    write_json,
    write_safetensors,
)
from kmerge_mlx.hub import fetch, is_namespaced

TUNING_CONFIG = "adapter_config.json"
TUNING_WEIGHTS = "adapters.safetensors"
MERGE_CONFIG = "merge_config.json"
MERGE_WEIGHTS = "merge_encoder.safetensors"
FILES = (TUNING_CONFIG, TUNING_WEIGHTS, MERGE_CONFIG, MERGE_WEIGHTS)

HEAD = "lm_head"
ENCODER = "encoder"
LCLM_CONFIGS = ("model_config.json", "checkpoint_*/model_config.json")
"""One of them is in every checkpoint of LCLM."""


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
        encoder_folder: Where a window encoder's language model lies, as mlx-lm loads it, or None.
    """

    merge: MergeConfig
    tuning: Tuning
    tuning_weights: dict[str, mx.array]
    encoder_weights: dict[str, mx.array]
    head_weights: dict[str, mx.array] = field(default_factory=dict)
    encoder_folder: Path | None = None


@dataclass(frozen=True)
class AdapterFolders:
    """The adapters that a name stands for, each one's ``merge_config.json`` read once."""

    name: str  # as the user wrote it
    root: Path  # that of a hub repo is in the hub's cache, and holds only the configs
    found: Mapping[int, tuple[Path, MergeConfig]]  # by merge factor, ascending
    repo: str | None = None  # user/name@commit of a hub repo

    def choose(self, k: int | None = None) -> tuple[Path, MergeConfig]:
        """The folder and the config of one adapter, its weights fetched if it is on the hub.

        Without ``k`` it is the only one there is (of ``bundled``, that for K = 4).
        """
        have = ", ".join(map(str, self.found))
        if k is None and self.root == bundled.ADAPTERS:
            k = bundled.DEFAULT_K
        if k is None and len(self.found) > 1:
            raise AdapterError(f"{self.name} holds adapters for K = {have}: choose one with `k`")
        if k is not None and k not in self.found:
            raise AdapterError(f"{self.name} holds no adapter for `k` {k!r}: it has K = {have}")
        folder, merge = self.found[next(iter(self.found)) if k is None else k]
        if self.repo is not None:
            inside = "" if folder == self.root else f"{glob.escape(folder.name)}/"
            names = (*FILES, f"{ENCODER}/*") if merge.has_window else FILES
            fetch(self.repo, [f"{inside}{name}" for name in names], AdapterError)
        return folder, merge

    @property
    def base(self) -> str | None:
        """The base model of the first adapter, as a folder or repo id; None if it names none."""
        folder, merge = next(iter(self.found.values()))
        if folder.name == CARRIED and self.repo is not None:
            return self.name
        if is_carried(folder):
            return str(folder.parent if folder.name == CARRIED else folder.resolve().parent)
        return merge.base.id


def look_up(path: str | Path) -> AdapterFolders:
    """Finds the adapters that a path means, and reads their ``merge_config.json``.

    It is an adapter folder, a folder of them (``k2/``, ``k4/``), a model folder that carries one, a
    hub repo of any of these (``user/name@revision``), or ``bundled``. Two of one K are refused.
    """
    return settled(Path(path), lambda: _look_up(path))


def _look_up(path: str | Path) -> AdapterFolders:
    found: dict[int, tuple[Path, MergeConfig]] = {}
    try:
        root, repo = _local(path)
        folders = [root]
        if root.is_dir() and not (root / MERGE_CONFIG).is_file():
            # A hidden folder is one that a killed run was still writing.
            folders = sorted(child for child in root.iterdir() if not child.name.startswith("."))
        for folder in folders:
            if (folder / MERGE_CONFIG).is_file():
                merge = _read_config(folder, MERGE_CONFIG, MergeConfig.from_json)
                if repo is None:  # what a repo names is not on this machine
                    made_for = replace(merge.base, id=found_id(merge.base.id, folder))
                    merge = replace(merge, base=made_for)
                if (k := merge.merge_factor) in found:
                    several = f"{path} holds several adapters for K = {k}"
                    names = f"{found[k][0].name}, {folder.name}"
                    raise AdapterError(f"{several}: name one of {names}")
                found[k] = folder, merge
    except OSError as e:
        raise AdapterError(f"cannot read {path}: {e.strerror}") from None
    if not found:
        raise AdapterError(f"{path} {_what_else(root)}")
    return AdapterFolders(str(path), root, dict(sorted(found.items())), repo)


def _local(path: str | Path) -> tuple[Path, str | None]:
    """The folder that a path is, or that holds a hub repo's configs; and the repo's commit."""
    if path == bundled.BUNDLED:
        return bundled.ADAPTERS, None
    folder = Path(path)
    if folder.is_dir():
        return folder, None
    if folder.exists() or not is_namespaced(str(path)):
        raise AdapterError(
            f"{path} is not a folder: expected an adapter, or the name of a hub repo of one "
            "(user/name)"
        )
    patterns = [f"{at}{name}" for at in ("", "*/") for name in (MERGE_CONFIG, TUNING_CONFIG)]
    folder = fetch(str(path), [*patterns, *LCLM_CONFIGS], AdapterError)
    # The hub's cache calls the folder of a version by its commit.
    return folder, f"{str(path).partition('@')[0]}@{folder.name}"


def find_adapters(path: str | Path) -> dict[int, Path]:
    """The adapters in a folder or a hub repo, by merge factor: see :func:`look_up`."""
    return {k: folder for k, (folder, _) in look_up(path).found.items()}


def carried_by(model_folder: Path) -> Path | None:
    """The adapter that a model folder carries, as ``fuse`` and ``quantize`` write it, or None."""
    carried = model_folder / CARRIED
    try:
        return carried if (carried / MERGE_CONFIG).is_file() else None
    except OSError as e:
        raise AdapterError(f"cannot read {carried}: {e.strerror}") from None


def is_carried(folder: Path) -> bool:
    """Whether an adapter is one that the model folder around it carries."""
    folder = folder.resolve()
    return folder.name == CARRIED and (folder.parent / "config.json").is_file()


def check_plain_encoder(merge: MergeConfig, what: str) -> None:
    """Refuses a merge encoder that can be read with but not be ``trained``, say."""
    if merge.has_window:
        raise AdapterError(f"a window encoder cannot be {what}: it is converted from PyTorch alone")
    if merge.encoder is not None and (packing := merge.encoder.quantization) is not None:
        raise AdapterError(
            f"the merge encoder is quantized to {packing.bits} bits, and cannot be {what}: take "
            "the adapter that it was made from"
        )


def share_tuning(adapters: Sequence[Adapter]) -> bool:
    """Whether all adapters change the base alike, to the bit, and so differ in their encoders."""
    first, *others = adapters
    return all(
        (other.tuning, other.merge.head_lora) == (first.tuning, first.merge.head_lora)
        and mine.keys() == theirs.keys()
        and all(mx.array_equal(array, theirs[name]).item() for name, array in mine.items())
        for other in others
        for mine, theirs in (
            (first.tuning_weights, other.tuning_weights),
            (first.head_weights, other.head_weights),
        )
    )


def load_adapter(path: str | Path, k: int | None = None) -> Adapter:
    """Finds and reads an adapter.

    Args:
        path: An adapter folder, a folder of several, a hub repo, or ``bundled``.
        k: Merge factor wanted; None takes the only one there is.

    Raises:
        AdapterError: No adapter, no such K, or as for :func:`read_adapter`.
    """
    return read_adapter(*look_up(path).choose(k))


def read_adapter(folder: Path, merge: MergeConfig) -> Adapter:
    """Reads an adapter, lazily; an AdapterError lists every tensor that does not fit."""
    return settled(folder, lambda: _read_adapter(folder, merge))


def _read_adapter(folder: Path, merge: MergeConfig) -> Adapter:
    tuning = _read_config(folder, TUNING_CONFIG, read_tuning)
    tuned = read_safetensors(folder / TUNING_WEIGHTS, AdapterError)
    packed = merge.encoder is not None and merge.encoder.packed
    dtypes = (*FLOAT_DTYPES, "U32") if packed else FLOAT_DTYPES
    merged = read_safetensors(folder / MERGE_WEIGHTS, AdapterError, dtypes)
    if isinstance(tuning, LoRAConfig):
        wrong = _lora_problems(tuning, tuned)
    else:  # which tensors whole layers have, only the base model knows
        wrong = [] if tuned else ["found no tensors, expected the weights of whole layers"]
    problems = [f"{TUNING_WEIGHTS}: {p}" for p in wrong]
    problems += [f"{MERGE_WEIGHTS}: {p}" for p in _merge_problems(merge, merged)]
    if problems:
        raise AdapterError(findings(str(folder), problems))
    parts: dict[str, dict[str, mx.array]] = {ENCODER: {}, HEAD: {}}
    for name, array in merged.items():
        part, _, inner = name.partition(".")
        parts[part][inner] = array
    own = folder / ENCODER if merge.has_window else None
    return Adapter(merge, tuning, tuned, parts[ENCODER], parts[HEAD], own)


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Writes an adapter folder whole or not at all; replaces the folder that is there.

    Raises:
        AdapterError: It cannot be written. Nothing is left of it then.
    """
    try:
        with replacing_folder(Path(path)) as folder:
            write_adapter(adapter, folder)
    except OSError as e:
        raise AdapterError(f"cannot write {path}: {e.strerror or first_line(e)}") from e


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Writes an adapter's files into a folder that its caller makes appear whole, where it is."""
    merge = portable(adapter.merge, folder)
    merged = {f"{ENCODER}.{name}": array for name, array in adapter.encoder_weights.items()}
    merged |= {f"{HEAD}.{name}": array for name, array in adapter.head_weights.items()}
    tuning = adapter.tuning.to_json() | {"model": merge.base.id}
    write_json(folder / TUNING_CONFIG, tuning)
    write_safetensors(folder / TUNING_WEIGHTS, adapter.tuning_weights)
    write_json(folder / MERGE_CONFIG, merge.to_json())
    write_safetensors(folder / MERGE_WEIGHTS, merged)
    if adapter.encoder_folder is not None and adapter.encoder_folder != folder / ENCODER:
        shutil.copytree(adapter.encoder_folder, folder / ENCODER)
        for file in (folder / ENCODER).iterdir():
            flush(file)


def check_adapter_destination(path: str | Path, force: bool) -> None:
    """Refuses to write an adapter over something else (see :func:`files.check_destination`)."""
    names = (*FILES, ENCODER)
    check_destination(path, force, "adapter", names, AdapterError, marker=MERGE_CONFIG)


def _read_config(folder: Path, name: str, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(read_json(folder / name, AdapterError))
    except AdapterError as e:
        raise AdapterError(f"{folder}: {e}") from None


def _lora_problems(config: LoRAConfig, weights: Mapping[str, mx.array]) -> list[str]:
    """Tensors without a module, modules without tensors, and wrong ranks; needs no base model."""
    keys = set(config.keys)
    hits = {module: keys & name_ends(module) for module in {n.rpartition(".")[0] for n in weights}}
    modules = {**config.modules, **{module: config.uniform for module, hit in hits.items() if hit}}
    expected: dict[str, tuple] = {}
    for module, spec in modules.items():
        expected |= _lora_shapes(module, spec.rank, weights)
    unused = keys - set().union(*hits.values())
    problems = [f"key {key} has no tensors" for key in unused]
    return sorted(problems + tensor_problems(expected, weights))


def _lora_shapes(module: str, rank: int, stored: Mapping[str, mx.array]) -> dict[str, tuple]:
    """The shapes of a module's LoRA; widths, which only the base model knows, are as stored."""
    names = [f"{module}.{part}" for part in LORA_PARTS]
    a, b = (stored[name].shape if name in stored else () for name in names)
    if len(a) == len(b) == 3:  # mlx-lm's experts: (experts, r, in) and (experts, out, r)
        return dict(zip(names, [(a[0], rank, a[2]), (*b[:2], rank)], strict=True))
    inner, out = (a[0] if len(a) == 2 else "in"), (b[1] if len(b) == 2 else "out")
    return dict(zip(names, [(inner, rank), (rank, out)], strict=True))


def name_ends(module: str) -> set[str]:
    """A module's path and every part of it after a dot: the suffixes that name the module."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _merge_problems(merge: MergeConfig, stored: Mapping[str, mx.array]) -> list[str]:
    expected, packed = {}, set()
    if merge.head_lora is not None:
        expected = _lora_shapes(HEAD, merge.head_lora.rank, stored)
    if (encoder := merge.encoder) is not None:
        packed = {f"{ENCODER}.{name}" for name in encoder.packed}
        if merge.head_lora is not None:
            expected[f"{HEAD}.lora_a"] = (encoder.hidden_size, merge.head_lora.rank)
        expected |= {f"{ENCODER}.{name}": shape for name, shape in encoder.shapes().items()}
    return tensor_problems(expected, stored, packed)


def is_lclm(path: Path) -> bool:
    """Whether a folder is a checkpoint of LCLM, or holds some."""
    return any(any(path.glob(name)) for name in LCLM_CONFIGS)


def _what_else(path: Path) -> str:
    """Says what a folder without an adapter is instead, and what to do about it."""
    if is_lclm(path):
        return f"is a checkpoint of LCLM: run `kmerge-mlx convert {path} DST` first"
    if any((path / name).is_file() for name in ("encoder.pth", "kmerge.json")):
        return f"is a PyTorch checkpoint: run `kmerge-mlx convert {path} DST` first"
    if any(path.glob("*/encoder.pth")):
        return f"holds PyTorch checkpoints: run `kmerge-mlx convert {path} DST` first"
    if (path / TUNING_CONFIG).is_file():
        config = read_json(path / TUNING_CONFIG, AdapterError)
        if isinstance(config, dict) and "peft_type" in config:
            return "is a PEFT adapter without a merge encoder: convert the whole checkpoint folder"
        return f"is an mlx-lm adapter without a merge encoder ({MERGE_CONFIG} is missing)"
    if (path / "config.json").is_file():
        return "is a base model, not an adapter: give it as `model`"
    return f"is not an adapter folder: {MERGE_CONFIG} is missing"
