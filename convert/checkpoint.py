"""Converts a checkpoint of the paper's code, or one that ``export`` wrote, to an adapter folder.

A checkpoint is a folder with ``encoder.pth``, PEFT's ``adapter_config.json`` and
``adapter_model.safetensors`` (or ``.bin``), and ``metrics.json``; an exported one has
``kmerge.json`` too, for what those cannot say.

Source: the authors' state dict, ``net.{0,2,4}`` of an ``nn.Sequential`` (arXiv 2604.15153, released
code).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters.folder import (
    HEAD,
    MERGE_CONFIG,
    Adapter,
    check_adapter_destination,
    save_adapter,
)
from kmerge_mlx.adapters.lora import tensor_problems
from kmerge_mlx.adapters.portable import found_id
from kmerge_mlx.adapters.schema import BaseModelConfig, EncoderConfig, MergeConfig
from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.convert.base_model import Base
from kmerge_mlx.convert.names import unwrapped
from kmerge_mlx.convert.peft import ZERO_3, lora_from_peft
from kmerge_mlx.convert.torch_read import read_state_dict
from kmerge_mlx.errors import AdapterError, CheckpointError, collect, findings, short
from kmerge_mlx.files import read_json, read_safetensors
from kmerge_mlx.hub import fetch
from kmerge_mlx.prompts.lay_out import ALL, Layout

ENCODER = "encoder.pth"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
COMPANION = "kmerge.json"
PROVENANCE = ("metrics.json", "eval_accuracy.json")
FETCHED = (*PEFT_WEIGHTS, ENCODER, PEFT_CONFIG, COMPANION, MERGE_CONFIG, *PROVENANCE)
PATTERNS = (*FETCHED, *(f"*/{name}" for name in FETCHED))
"""What of a hub repo is fetched; ``merge_config.json`` tells one that is converted already."""
MAX_PROVENANCE_BYTES = 64 << 10

# Sub-folders that a run leaves, the one to take first.
SUBFOLDERS = ("best", "step_best", "last", "step_last")

# PyTorch name -> our name; both libraries keep a linear layer's weight as (out, in).
ENCODER_NAMES = {
    f"net.{2 * i}.{part}": f"w{i + 1}.{part}" for i in range(3) for part in ("weight", "bias")
}


def convert_checkpoint(
    source: str,
    destination: str | Path,
    model: str | None = None,
    k: int | None = None,
    dtype: str | None = None,
    force: bool = False,
    note: Callable[[str], object] | None = None,
) -> Adapter:
    """Converts a PyTorch checkpoint into an adapter folder.

    Args:
        source: Checkpoint folder, or hub repo id (``user/name@revision``).
        destination: Adapter folder to write.
        model: Base model, folder or repo id; None leaves what only it can tell (padding token,
            tied head, fit) to be settled when the adapter is loaded.
        k: Merge factor the user expects, or None.
        dtype: ``float32``, ``float16`` or ``bfloat16`` to cast to, or None to keep the dtypes.
        force: Replace an adapter folder at ``destination``.
        note: Receives one line if something of the checkpoint was left out.

    Returns:
        What was written.

    Raises:
        CheckpointError: Everything wrong with the checkpoint, listed, or weights too large for
            ``dtype``.
        AdapterError: The destination exists, or cannot be written.
        ModelError: The base model cannot be read.
    """
    check_adapter_destination(destination, force)
    folder = find_checkpoint(source)
    known = None if model is None else Base.read(model)
    adapter = read_checkpoint(folder, known, k, source, note)
    if dtype is not None:
        adapter = _cast(adapter, dtype)
    save_adapter(adapter, destination)
    return adapter


def find_checkpoint(source: str) -> Path:
    """The folder of a checkpoint in a folder or hub repo, whose best/last sub-folders count too."""
    root = Path(source)
    try:
        if root.is_file():
            raise CheckpointError(f"{source} is a file: give the folder that holds {ENCODER}")
        if not root.is_dir():
            root = fetch(source, PATTERNS, CheckpointError)
        if (root / MERGE_CONFIG).is_file():
            raise CheckpointError(f"{source} is an adapter folder already: nothing to convert")
        if (root / ENCODER).is_file() or (root / PEFT_CONFIG).is_file():
            return root
        inside = {path.parent.name for path in root.glob(f"*/{ENCODER}")}
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror}") from None
    names = [name for name in SUBFOLDERS if name in inside][:1] or sorted(inside)
    if len(names) == 1:
        return root / names[0]
    if names:
        several = f"{source} holds several checkpoints ({', '.join(names)})"
        raise CheckpointError(f"{several}: name one of them")
    raise CheckpointError(
        f"{source} holds no {ENCODER} and no {PEFT_CONFIG}: expected a checkpoint folder "
        "as the K-Token-Merging code writes it, or LCLM's (model_config.json beside decoder, "
        "encoder and adapter)"
    )


def read_checkpoint(
    folder: Path,
    known: Base | None,
    k: int | None,
    source: str,
    note: Callable[[str], object] | None = None,
) -> Adapter:
    """Reads a checkpoint folder, which the user called ``source``; all that is wrong is listed.

    ``known`` is the base, where the user named it.
    """
    problems: list[str] = []
    stated, scales = collect(problems, _read_companion, folder) or (None, [])
    facts = known.merge if known else stated or MergeConfig(None)
    fields = facts.base.fields
    encoder, encoder_weights = _read_encoder(folder, k, stated, problems)
    tensors = collect(problems, read_peft_tensors, folder)
    config = collect(problems, read_json, folder / PEFT_CONFIG, CheckpointError)
    lora = None
    copies = known.take_copies(tensors, problems) if tensors and known else []
    if tensors is not None and (config is not None or not problems):
        # The head's LoRA of an untied base may lie beside the encoder for all that.
        apart = known is None and stated is not None and stated.head_lora is not None
        untied = not apart and base.is_tied(fields) is False
        layers = fields.get("num_hidden_layers")
        layers = layers if is_int(layers) else None
        lora = lora_from_peft(config, tensors, problems, untied, layers, scales)
    problems += not_finite(encoder_weights)
    if lora is not None:
        problems += not_finite(lora.tuning_weights | named_head(lora))
        by = str(known) if known else f"the base in {COMPANION}"
        problems += _cross_check(encoder, lora, fields, by)
        if known is not None:
            problems += known.lora_problems(lora.tuning_weights, config)
    if stated is not None:
        problems += _companion_problems(stated, encoder, known)
    if problems or lora is None:
        raise CheckpointError(findings(f"{source} cannot be converted", problems))
    if copies and note is not None:
        note(f"left out, as copies of the base's tensors: {', '.join(copies)}")
    recorded = config.get("base_model_name_or_path")
    good = isinstance(recorded, str) and recorded.isprintable()
    recorded = found_id(recorded, folder) if good else None
    # The authors' code merges the whole prompt, and applies no chat template.
    stated = stated or MergeConfig(None, layout=Layout(ALL, chat_template=False))
    # What the encoder was trained with, even where that is not the tokenizer's default.
    pad = facts.pad_token_id if stated.pad_token_id is None else stated.pad_token_id
    merge = replace(
        stated,
        encoder=encoder,
        base=BaseModelConfig(facts.base.id or recorded, fields),
        pad_token_id=pad,
        head_lora=lora.merge.head_lora,
        provenance=_provenance(folder, source, config) | stated.provenance,
    )
    return replace(lora, merge=merge, encoder_weights=encoder_weights)


def _read_companion(folder: Path) -> tuple[MergeConfig, list[float]] | None:
    """``kmerge.json``, if it is there: what encoder.pth and PEFT's files cannot say of an adapter.

    That is its ``merge_config.json``, and the LoRA scales that PEFT's files give only to within the
    last bit of a float64. The LoRA may have other ones: it may have been trained on, in PyTorch.
    """
    path = folder / COMPANION
    if not path.exists():
        return None
    try:
        data = read_json(path, CheckpointError)
        if not isinstance(data, dict) or data.keys() != {MERGE_CONFIG, "scales"}:
            raise AdapterError(f"found {short(data)}, expected {MERGE_CONFIG} and scales")
        scales = data["scales"]
        if not isinstance(scales, list) or not all(map(is_number, scales)):
            raise AdapterError(f"scales is {short(scales)}, expected a list of numbers")
        merge = MergeConfig.from_json(data[MERGE_CONFIG])
        if not (name := merge.base.id or "").isprintable():
            raise AdapterError(f"base_model.id is {short(name)}, expected a printable name")
        made_for = replace(merge.base, id=found_id(merge.base.id, folder))
        return replace(merge, base=made_for), scales
    except AdapterError as error:
        advice = "remove the file to convert without it"
        raise CheckpointError(f"{path}: {error}; {advice}") from None


def _companion_problems(
    stated: MergeConfig, encoder: EncoderConfig | None, known: Base | None
) -> list[str]:
    """Where ``kmerge.json`` contradicts the encoder or the base that are there."""
    differences = []
    if encoder is not None and stated.encoder is None:
        k = encoder.merge_factor
        differences = [f"found an encoder for K = {k}, the adapter was made for none"]
    elif encoder is not None:
        found, said = encoder.to_json(), stated.encoder.to_json()
        wrong = [name for name in said if found.get(name) != said[name]]
        differences = [f"the encoder has {n} {found.get(n)}, not {said[n]}" for n in wrong]
    if known is not None:
        fields = known.merge.base.fields
        differences += [f"{known}: {d}" for d in stated.base.differences(fields)]
    return [f"{d} (says {COMPANION}; remove it to convert without it)" for d in differences]


def _read_encoder(
    folder: Path, k: int | None, stated: MergeConfig | None, problems: list[str]
) -> tuple[EncoderConfig | None, dict[str, mx.array]]:
    """The sizes and the renamed tensors of the encoder, as far as they can be told."""
    if stated is not None and stated.encoder is None and not (folder / ENCODER).exists():
        if k not in (None, 1):
            problems.append(f"{COMPANION} says K = 1, but `k` is {k}: give 1 or leave it out")
        return None, {}
    state = collect(problems, _gathered, read_state_dict, folder / ENCODER)
    if state is None:
        return None, {}
    plain = {unwrapped(name): array for name, array in state.items()}
    if len(plain) < len(state):
        twice = "some tensors are there with and without a wrapper's prefix, as module. (keep one)"
        problems.append(f"{ENCODER}: {twice}")
    sizes = collect(problems, _encoder_sizes, plain)
    if sizes is None:
        return None, {}
    if k not in (None, sizes.merge_factor):
        problems.append(
            f"{ENCODER} merges K = {sizes.merge_factor} tokens, but `k` is {k}: "
            f"give {sizes.merge_factor} or leave it out"
        )
    expected = {theirs: sizes.shapes()[ours] for theirs, ours in ENCODER_NAMES.items()}
    found = {name: array.shape for name, array in plain.items()}
    problems += [f"{ENCODER}: {p}" for p in tensor_problems(expected, found)]
    return sizes, {ours: plain[name] for name, ours in ENCODER_NAMES.items() if name in plain}


def _encoder_sizes(state: Mapping[str, mx.array]) -> EncoderConfig:
    first, last = state.get("net.0.weight"), state.get("net.4.weight")
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        names = ", ".join(sorted(state)[:8]) or "nothing"
        raise CheckpointError(
            f"{ENCODER}: not a merge encoder: found {names}, expected 2-dimensional net.0.weight "
            "and net.4.weight"
        )
    (inner, wide), hidden = first.shape, last.shape[0]
    if hidden == 0 or wide % hidden or wide // hidden < 2:
        raise CheckpointError(
            f"{ENCODER}: net.0.weight {first.shape} and net.4.weight {last.shape} give no "
            "whole merge factor of at least 2"
        )
    return EncoderConfig(wide // hidden, hidden, inner)


def read_peft_tensors(folder: Path) -> dict[str, mx.array]:
    """The tensors of PEFT's files in a folder, safe or pickled, of which each holds numbers."""
    safe, pickled = (folder / name for name in PEFT_WEIGHTS)
    if safe.is_file():
        return _gathered(read_safetensors, safe, CheckpointError)
    if pickled.is_file():
        return _gathered(read_state_dict, pickled)
    raise CheckpointError(f"{folder} holds neither {safe.name} nor {pickled.name}")


def _gathered(read: Callable[..., dict[str, mx.array]], path: Path, *more: Any) -> Any:
    """The tensors of a file; refuses those of which only the names are there."""
    tensors = read(path, *more)
    if empty := [name for name, array in tensors.items() if array.shape == (0,)]:
        listed = f"{len(empty)} of {len(tensors)} tensors are empty"
        raise CheckpointError(f"{path}: {listed}, {empty[0]} for one; {ZERO_3}")
    return tensors


def _cross_check(
    encoder: EncoderConfig | None, lora: Adapter, fields: Mapping[str, Any], by: str
) -> list[str]:
    """What encoder, LoRA and base must agree on; ``by`` says who describes the base."""
    head = named_head(lora) or lora.tuning_weights
    a, b = (head.get(f"{HEAD}.{name}") for name in ("lora_a", "lora_b"))
    hidden = encoder and encoder.hidden_size
    problems = []
    if hidden is not None and a is not None and a.shape[0] != hidden:
        problems.append(f"lm_head's LoRA reads {a.shape[0]} features, the encoder writes {hidden}")
    if encoder is not None and base.scales_embeddings(fields):
        problems.append(
            f"{by} scales embeddings inside the model, and the paper's code fed it unscaled ones: "
            "such a checkpoint has no equal here (docs/method.md, Gemma)"
        )
    for name, ours, whose in (
        ("hidden_size", hidden, "the encoder has"),
        ("vocab_size", None if b is None else b.shape[1], "lm_head's LoRA has"),
    ):
        if ours is not None and fields.get(name, ours) != ours:
            problems.append(f"{by} has {name} {fields[name]}, {whose} {ours}")
    layers, covered = fields.get("num_hidden_layers"), lora.tuning.num_layers
    if is_int(layers) and covered > layers:
        problems.append(f"{by} has {layers} layers, the LoRA covers {covered}")
    return problems


def named_head(adapter: Adapter) -> dict[str, mx.array]:
    """The head's LoRA tensors by their names in files."""
    return {f"{HEAD}.{name}": array for name, array in adapter.head_weights.items()}


def not_finite(tensors: Mapping[str, mx.array]) -> list[str]:
    """Which tensors are not numbers to compute with, one line each."""
    return tensor_problems(tensors, tensors) + [
        f"{name} holds NaN or infinite values: the training run diverged"
        for name, array in tensors.items()
        if not mx.isfinite(array).all().item()
    ]


def _provenance(folder: Path, source: str, config: Mapping[str, Any]) -> dict[str, Any]:
    provenance: dict[str, Any] = {"converter": f"kmerge-mlx {__version__}", "source": source}
    if isinstance(config.get("peft_version"), str):
        provenance["peft_version"] = config["peft_version"]
    for path in filter(Path.is_file, (folder / name for name in PROVENANCE)):
        try:
            content = read_json(path, CheckpointError)
        except CheckpointError as error:  # for people alone: a torn file is not in the way
            content = f"left out: {error}"
        if (size := path.stat().st_size) > MAX_PROVENANCE_BYTES:
            content = f"left out: {size} bytes"
        provenance[path.stem] = content
    return provenance


def _cast(adapter: Adapter, dtype: str) -> Adapter:
    lora, encoder, head = (
        {name: array.astype(base.DTYPES[dtype]) for name, array in tensors.items()}
        for tensors in (adapter.tuning_weights, adapter.encoder_weights, adapter.head_weights)
    )
    cast = Adapter(adapter.merge, adapter.tuning, lora, encoder, head)
    if large := not_finite(lora | encoder | named_head(cast)):
        names = ", ".join(problem.split()[0] for problem in large)
        raise CheckpointError(f"`dtype` {dtype} cannot hold {names}: give float32 or bfloat16")
    return cast
