"""Converts a checkpoint of LCLM to a model folder: decoder, window encoder, projection, tokenizers.

A checkpoint is a folder with ``decoder/`` (a causal language model, or a PEFT LoRA of one),
``encoder/`` (a language model without its head), ``adapter/adapter.safetensors`` (the projection)
and ``model_config.json``. Weights go from file to file, a shard in memory at once.

Source: arXiv 2606.09659, ``latent-context/*-LCLM-*`` on the hub; docs/lclm.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters.folder import (
    ENCODER,
    LCLM_CONFIGS,
    Adapter,
    check_adapter_destination,
    is_lclm,
    write_adapter,
)
from kmerge_mlx.adapters.lora import tensor_problems
from kmerge_mlx.adapters.schema import BaseModelConfig, LoRAConfig, MergeConfig
from kmerge_mlx.adapters.window import POOLINGS, WindowConfig
from kmerge_mlx.config import CARRIED, is_int
from kmerge_mlx.convert.base_model import Base
from kmerge_mlx.convert.checkpoint import PEFT_CONFIG, named_head, not_finite, read_peft_tensors
from kmerge_mlx.convert.language_model import LanguageModel, Progress
from kmerge_mlx.convert.marked_tokenizer import (
    MARKS,
    TOKENIZER,
    read_marks,
    text_problems,
    write_tokenizer,
)
from kmerge_mlx.convert.peft import lora_from_peft
from kmerge_mlx.errors import (
    AdapterError,
    CheckpointError,
    collect,
    findings,
    first_line,
    short,
)
from kmerge_mlx.files import (
    check_destination,
    flush,
    read_json,
    read_safetensors,
    replacing_folder,
)
from kmerge_mlx.hub import fetch, is_namespaced
from kmerge_mlx.prompts.policy import DEFAULT_LAYOUT

CONFIG = "model_config.json"
DECODER, PROJECTION = "decoder", "adapter/adapter.safetensors"
STEP = "checkpoint_"
PATTERNS = tuple(
    f"{at}{name}"
    for at in ("", f"{STEP}*/")
    for name in (CONFIG, PROJECTION, f"{DECODER}/*", f"{ENCODER}/*")
)
"""What of a hub repo is fetched."""
# What model_config.json must say, and what is understood of it.
MEANT = {
    "pooling": POOLINGS,
    "encoder_mask_type": ("causal",),
    "adapter_type": ("mlp",),
}
# Its sizes: what WindowConfig calls them, and the least.
SIZES = {
    "compression_ratio": ("merge_factor", 2),
    "encoder_window_size": ("window", 1),
    "boundary_overlap": ("overlap", 0),
}


@dataclass(frozen=True)
class Packing:
    """How weights are packed, in MLX's affine mode; None: they stay as they are."""

    bits: int | None = None  # of the decoder's weights
    encoder_bits: int | None = None
    group_size: int = 64


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, checked."""

    encoder: LanguageModel
    decoder: LanguageModel | None  # None where it is a LoRA
    adapter: Adapter  # with the projection, and the LoRA if there is one


def find_window(source: str) -> Path | None:
    """The folder of a checkpoint in a folder or hub repo, or None if it is not of this kind."""
    root = Path(source)
    if not root.is_dir():
        if root.exists() or not is_namespaced(source):
            return None
        root = fetch(source, LCLM_CONFIGS, CheckpointError)
        if is_lclm(root):
            root = fetch(source, PATTERNS, CheckpointError)
    return root if is_lclm(root) else None


def convert_window(
    root: Path,
    source: str,
    destination: str | Path,
    model: str | None = None,
    k: int | None = None,
    dtype: str | None = None,
    packing: Packing = Packing(),
    force: bool = False,
    progress: Callable[[str], Progress] = lambda label: lambda done, total: None,
    note: Callable[[str], object] = lambda text: None,
) -> MergeConfig:
    """Converts a checkpoint into one folder.

    Args:
        root: Its folder; of ``checkpoint_STEP`` folders in it, that of the largest step counts.
        source: What the user called it.
        destination: Folder to write: a model folder, or for a LoRA an adapter folder.
        model: Base of the LoRA; None takes the one that it names.
        k: Merge factor the user expects, or None.
        dtype: What to cast the weights to, or None to keep their dtypes.
        packing: How weights are packed.
        force: Replace a folder of the same kind.
        progress: A label to what is called with (tensors written, tensors in all).
        note: Receives one line for a part of which not all is packed.

    Returns:
        What the folder says of itself.

    Raises:
        CheckpointError: Everything wrong with the checkpoint, listed.
        AdapterError: The destination exists, or cannot be written.
    """
    folder = newest(root)
    if (folder / DECODER / PEFT_CONFIG).is_file():
        check_adapter_destination(destination, force)
    else:
        names = (*DEFAULT_ALLOW_PATTERNS, "README.md", CARRIED)
        check_destination(destination, force, "model", names, AdapterError, marker="config.json")
        check_adapter_destination(Path(destination) / CARRIED, force)
    found = read_window(folder, root, source, model, k, packing)
    parts = ((found.decoder, packing.bits), (found.encoder, packing.encoder_bits))
    uneven = [part.uneven(packing.group_size) for part, bits in parts if bits is not None]
    cast = None if dtype is None else base.DTYPES[dtype]
    try:
        with replacing_folder(Path(destination)) as new:
            _write(found, new, cast, packing, progress)
    except RuntimeError as error:  # MLX could not write a file
        raise AdapterError(f"cannot write {destination}: {first_line(error)}") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise AdapterError(f"cannot write {destination}: {reason}") from error
    for text in filter(None, uneven):
        note(text)
    return found.adapter.merge


def newest(root: Path) -> Path:
    """The checkpoint of the largest step in a folder, or the folder itself."""
    steps = {int(p.name.removeprefix(STEP)): p for p in root.glob(f"{STEP}*") if _is_step(p)}
    return steps[max(steps)] if steps and not (root / DECODER).is_dir() else root


def _is_step(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix(STEP).isdecimal()


def read_window(
    folder: Path, root: Path, source: str, model: str | None, k: int | None, packing: Packing
) -> Checkpoint:
    """Reads a checkpoint folder, which the user called ``source``; all that is wrong is listed."""
    problems: list[str] = []
    path = folder / CONFIG if (folder / CONFIG).is_file() else root / CONFIG
    stated = collect(problems, _settings, path, k)
    encoder = LanguageModel.read(folder / ENCODER, "model.", problems)
    projection = collect(problems, read_safetensors, folder / PROJECTION, CheckpointError)
    marks = collect(problems, read_marks, folder / DECODER / TOKENIZER)
    problems += text_problems(folder / ENCODER)
    decoder, lora = None, None
    if (folder / DECODER / PEFT_CONFIG).is_file():
        lora = collect(problems, _read_lora, folder / DECODER, model)
        if packing.bits is not None:
            problems.append("`q_bits` packs a whole decoder, and this holds a LoRA: leave it out")
    elif model is not None:
        problems.append("`model` is for a LoRA, and this holds a whole decoder: leave it out")
    else:
        decoder = LanguageModel.read(folder / DECODER, "", problems)
        problems += text_problems(folder / DECODER)
    rows = decoder and base.table_rows(decoder.model)
    problems += [
        f"{DECODER}/{TOKENIZER} numbers {mark} {number:,}, but the table has {rows:,} rows"
        for mark, number in (marks or {}).items()
        if rows is not None and number >= rows
    ]
    width = decoder.width if decoder else lora and lora.merge.base.fields.get("hidden_size")
    config = None
    if None not in (stated, encoder, projection, marks, width):
        wide = projection.get("fc1.weight", mx.zeros((1, 1))).shape[0]
        config = collect(
            problems,
            lambda: WindowConfig(
                hidden_size=width,
                encoder_size=encoder.width,
                inner_size=wide,
                start_token_id=marks[MARKS[1]],
                end_token_id=marks[MARKS[2]],
                **stated,
            ),
        )
    if config is not None:
        collect(problems, config.check_reader, base.context_length(encoder.config))
        found = [f"{PROJECTION}: {p}" for p in tensor_problems(config.shapes(), projection)]
        problems += found or [f"{PROJECTION}: {p}" for p in not_finite(projection)]
    if problems:
        distinct = [*dict.fromkeys(problems)]  # a part may be in the way of several
        raise CheckpointError(findings(f"{source} cannot be converted", distinct))
    provenance = {"converter": f"kmerge-mlx {__version__}", "source": source}
    if decoder is not None:
        made_for = BaseModelConfig(None, base.fingerprint(decoder.config))
        lora = Adapter(MergeConfig(None, made_for), LoRAConfig(0), {}, {})
    more = {"encoder": config, "layout": DEFAULT_LAYOUT, "provenance": provenance}
    merge = replace(lora.merge, **more)
    return Checkpoint(encoder, decoder, replace(lora, merge=merge, encoder_weights=projection))


def _settings(path: Path, k: int | None) -> dict[str, Any]:
    """What ``model_config.json`` says, by the names of :class:`WindowConfig`."""
    data = read_json(path, CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {short(data)}, expected an object")
    data = {"boundary_overlap": 0} | data
    found = {n: short(data[n]) if n in data else "missing" for n in (*MEANT, *SIZES)}
    problems = [
        f"{name} is {found[name]}, expected {' or '.join(known)}"
        for name, known in MEANT.items()
        if data.get(name) not in known
    ]
    problems += [
        f"{name} is {found[name]}, expected a whole number from {least}"
        for name, (_, least) in SIZES.items()
        if not is_int(data.get(name), least)
    ]
    if k not in (None, data.get("compression_ratio")):
        problems.append(f"compression_ratio is {found['compression_ratio']}, but `k` is {k}")
    if problems:
        raise CheckpointError(findings(CONFIG, problems))
    return {ours: data[name] for name, (ours, _) in SIZES.items()} | {"pooling": data["pooling"]}


def _read_lora(folder: Path, model: str | None) -> Adapter:
    """A decoder's LoRA, compared with its base."""
    config = read_json(folder / PEFT_CONFIG, CheckpointError)
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if model is None and not isinstance(named, str):
        raise CheckpointError(f"{folder / PEFT_CONFIG} names no base: give `model`")
    known, problems = Base.read(model or named), []
    tensors = read_peft_tensors(folder)
    known.take_copies(tensors, problems)
    fields = known.merge.base.fields
    untied, layers = base.is_tied(fields) is False, fields.get("num_hidden_layers")
    lora = lora_from_peft(config, tensors, problems, untied, layers if is_int(layers) else None)
    if lora is not None:
        problems += not_finite(lora.tuning_weights | named_head(lora))
        problems += known.lora_problems(lora.tuning_weights, config)
    if problems or lora is None:
        raise CheckpointError(findings(str(folder), problems))
    return replace(lora, merge=replace(lora.merge, base=known.merge.base))


def _write(
    found: Checkpoint,
    folder: Path,
    dtype: mx.Dtype | None,
    packing: Packing,
    progress: Callable[[str], Progress],
) -> None:
    """Writes all of a folder: what may still be refused before what takes long."""
    place, size = folder, packing.group_size
    if found.decoder is not None:
        write_tokenizer(found.decoder.folder, folder, MARKS)
        place = folder / CARRIED
    own = place / ENCODER
    own.mkdir(parents=True)
    write_tokenizer(found.encoder.folder, own, ())
    _check_tokenizers(folder, own, found)
    if found.decoder is not None:
        wrote = progress("Writing the decoder")
        found.decoder.write(folder, dtype, packing.bits, size, wrote)
    projection = found.adapter.encoder_weights
    if dtype is not None:
        projection = {name: array.astype(dtype) for name, array in projection.items()}
    write_adapter(replace(found.adapter, encoder_weights=projection), place)
    wrote = progress("Writing the encoder")
    found.encoder.write(own, dtype, packing.encoder_bits, size, wrote)
    flush(place)


def _check_tokenizers(folder: Path, encoder: Path, found: Checkpoint) -> None:
    """Compares the two tokenizers: what one reads is counted, and weighed, by the other's ids."""
    own = base.read_tokenizer(encoder, found.encoder.config, str(found.encoder.folder))
    if found.decoder is None:
        return
    main = base.read_tokenizer(folder, found.decoder.config, str(found.decoder.folder))
    known = main.get_vocab()
    other = [token for token, i in own.get_vocab().items() if known.get(token, i) != i]
    if other:
        raise CheckpointError(
            f"the encoder's tokenizer gives {short(other[0])} another id than the decoder's "
            f"({len(other):,} such tokens): not supported"
        )
