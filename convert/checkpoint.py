"""Converts a checkpoint of the paper's code, or one that ``export`` wrote, to an adapter folder.

A checkpoint is a folder with ``encoder.pth``, PEFT's ``adapter_config.json`` and
``adapter_model.safetensors`` (or ``.bin``), and ``metrics.json``; an exported one has
``kmerge.json`` too, for what those cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_tokenizer

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters.folder import (
    HEAD,
    MERGE_CONFIG,
    Adapter,
    check_adapter_destination,
    save_adapter,
)
from kmerge_mlx.adapters.lora import tensor_problems
from kmerge_mlx.adapters.schema import BaseModelConfig, EncoderConfig, MergeConfig
from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.convert.encoder import encoder_from_torch
from kmerge_mlx.convert.peft import PeftLoRA, lora_from_peft
from kmerge_mlx.convert.torch_read import read_state_dict
from kmerge_mlx.errors import (
    AdapterError,
    CheckpointError,
    KMergeError,
    ModelError,
    findings,
    first_line,
    short,
)
from kmerge_mlx.files import read_json, read_safetensors
from kmerge_mlx.hub import fetch
from kmerge_mlx.prompts.policy import ALL, Layout

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


@dataclass(frozen=True)
class Base:
    """What converting needs to know of the base model, and who says it (for errors)."""

    id: str | None
    config: dict[str, Any]
    pad_token_id: int | None
    by: str


@dataclass(frozen=True)
class Companion:
    """The content of ``kmerge.json``: what encoder.pth and PEFT's files cannot say of an adapter.

    The LoRA may differ from it: it may have been trained on, in PyTorch.

    Args:
        merge: What the adapter's ``merge_config.json`` said.
        scales: LoRA scales that PEFT's files give only to within the last bit of a float64.
    """

    merge: MergeConfig
    scales: Sequence[float] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {MERGE_CONFIG: self.merge.to_json(), "scales": [*self.scales]}

    @classmethod
    def read(cls, folder: Path) -> Companion | None:
        """The companion in a checkpoint folder, or None where there is none.

        Raises:
            CheckpointError: The file is torn, or one of its entries is wrong.
        """
        path = folder / COMPANION
        if not path.exists():
            return None
        try:
            return cls._from_json(read_json(path, CheckpointError))
        except AdapterError as error:
            advice = "remove the file to convert without it"
            raise CheckpointError(f"{path}: {error}; {advice}") from None

    @classmethod
    def _from_json(cls, data: Any) -> Companion:
        if not isinstance(data, dict) or data.keys() != {MERGE_CONFIG, "scales"}:
            raise AdapterError(f"found {short(data)}, expected {MERGE_CONFIG} and scales")
        scales = data["scales"]
        if not isinstance(scales, list) or not all(is_number(scale) for scale in scales):
            raise AdapterError(f"scales is {short(scales)}, expected a list of numbers")
        merge = MergeConfig.from_json(data[MERGE_CONFIG])
        if not (name := merge.base.id or "").isprintable():
            raise AdapterError(f"base_model.id is {short(name)}, expected a printable name")
        return cls(merge, scales)


def convert_checkpoint(
    source: str,
    destination: str | Path,
    model: str | None = None,
    k: int | None = None,
    dtype: str | None = None,
    force: bool = False,
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
    known = None if model is None else _read_base(model)
    adapter = read_checkpoint(folder, known, k, source)
    if dtype is not None:
        adapter = _cast(adapter, dtype)
    save_adapter(adapter, destination)
    return adapter


def find_checkpoint(source: str) -> Path:
    """The folder that holds ``encoder.pth`` and the PEFT adapter.

    Args:
        source: A folder, or a hub repo id; its best/last sub-folders are looked into.

    Raises:
        CheckpointError: Not there, or holding no checkpoint, or several.
    """
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
    preferred = [name for name in SUBFOLDERS if name in inside] or sorted(inside)
    if preferred and (len(inside) == 1 or preferred[0] in SUBFOLDERS):
        return root / preferred[0]
    if inside:
        names = ", ".join(preferred)
        raise CheckpointError(f"{source} holds several checkpoints ({names}): name one of them")
    raise CheckpointError(
        f"{source} holds no {ENCODER} and no {PEFT_CONFIG}: expected a checkpoint folder "
        "as the K-Token-Merging code writes it"
    )


def _read_base(model: str) -> Base:
    path = base.resolve(model, weights=False)
    config = base.read_config(path)
    try:
        tokenizer = load_tokenizer(path)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{model}: its tokenizer cannot be read: {first_line(error)}") from error
    # A folder is recorded so that it can be found from anywhere.
    name = str(path.resolve()) if Path(model).is_dir() else model
    return Base(name, config, base.default_pad_token_id(tokenizer), f"`model` {name}")


def read_checkpoint(folder: Path, known: Base | None, k: int | None, source: str) -> Adapter:
    """Reads a checkpoint folder into memory.

    Args:
        folder: Holds ``encoder.pth`` and the PEFT adapter.
        known: The base model, or None.
        k: Merge factor the user expects, or None.
        source: What the user called the checkpoint, for provenance and errors.

    Raises:
        CheckpointError: Everything wrong with it, listed.
    """
    problems: list[str] = []
    companion = _collect(problems, Companion.read, folder)
    facts = known or _base_of(companion)
    encoder, encoder_weights = _read_encoder(folder, k, companion, problems)
    tensors = _collect(problems, _read_peft_tensors, folder)
    config = _collect(problems, read_json, folder / PEFT_CONFIG, CheckpointError)
    lora = None
    if tensors is not None and (config is not None or not problems):
        untied = facts is not None and base.is_tied(facts.config) is False
        if known is None and companion is not None and companion.merge.head_lora is not None:
            untied = False  # it may lie beside the encoder for all that
        layers = facts and base.fingerprint(facts.config).get("num_hidden_layers")
        scales = companion.scales if companion else ()
        layers = layers if is_int(layers) else None
        lora = lora_from_peft(config, tensors, problems, untied, layers, scales)
    problems += not_finite(encoder_weights)
    if lora is not None:
        problems += not_finite(lora.weights | named_head(lora.head_weights))
        problems += _cross_check(encoder, lora, facts)
    if companion is not None:
        problems += _companion_problems(companion.merge, encoder, known)
    if problems or lora is None:
        raise CheckpointError(findings(f"{source} cannot be converted", problems))
    merge = _merge_config(encoder, lora, facts, companion, config)
    provenance = _provenance(folder, source, config) | merge.provenance
    merge = replace(merge, provenance=provenance)
    return Adapter(merge, lora.config, lora.weights, encoder_weights, lora.head_weights)


def _base_of(companion: Companion | None) -> Base | None:
    if companion is None:
        return None
    stated, pad = companion.merge.base, companion.merge.pad_token_id
    return Base(stated.id, dict(stated.fields), pad, f"the base in {COMPANION}")


def _merge_config(
    encoder: EncoderConfig | None,
    lora: PeftLoRA,
    facts: Base | None,
    companion: Companion | None,
    config: Mapping[str, Any],
) -> MergeConfig:
    recorded = config.get("base_model_name_or_path")
    if not isinstance(recorded, str) or not recorded.isprintable():
        recorded = None
    name, fields = (facts.id, base.fingerprint(facts.config)) if facts else (None, {})
    # The authors' code merges the whole prompt, and applies no chat template.
    layout, provenance, pad = Layout(ALL, chat_template=False), {}, facts and facts.pad_token_id
    if companion is not None:
        layout, provenance = companion.merge.layout, companion.merge.provenance
        # What the encoder was trained with, even where that is not the tokenizer's default.
        pad = pad if companion.merge.pad_token_id is None else companion.merge.pad_token_id
    stated = BaseModelConfig(name or recorded, fields)
    return MergeConfig(encoder, stated, pad, lora.head, layout, provenance)


def _companion_problems(
    stated: MergeConfig, encoder: EncoderConfig | None, known: Base | None
) -> list[str]:
    """Where it contradicts the encoder or the base that are there."""
    differences = []
    if encoder is not None and stated.encoder is None:
        k = encoder.merge_factor
        differences.append(f"found an encoder for K = {k}, the adapter was made for none")
    elif encoder is not None:
        found, said = encoder.to_json(), stated.encoder.to_json()
        differences += [
            f"the encoder has {name} {found[name]}, not {said[name]}"
            for name in said
            if found[name] != said[name]
        ]
    if known is not None:
        fields = base.fingerprint(known.config)
        differences += [f"{known.by}: {d}" for d in stated.base.differences(fields)]
    return [f"{d} (says {COMPANION}; remove it to convert without it)" for d in differences]


def _read_encoder(
    folder: Path, k: int | None, companion: Companion | None, problems: list[str]
) -> tuple[EncoderConfig | None, dict[str, mx.array]]:
    merges = companion is None or companion.merge.encoder is not None
    if not merges and not (folder / ENCODER).exists():
        if k not in (None, 1):
            problems.append(f"{COMPANION} says K = 1, but `k` is {k}: give 1 or leave it out")
        return None, {}
    state = _collect(problems, read_state_dict, folder / ENCODER)
    found = None if state is None else encoder_from_torch(state, k, problems)
    return found or (None, {})


def _read_peft_tensors(folder: Path) -> dict[str, mx.array]:
    safe, pickled = (folder / name for name in PEFT_WEIGHTS)
    if safe.is_file():
        return read_safetensors(safe, CheckpointError)
    if pickled.is_file():
        return read_state_dict(pickled)
    raise CheckpointError(f"{folder} holds neither {safe.name} nor {pickled.name}")


def _collect(problems: list[str], read: Any, *arguments: Any) -> Any:
    """The result of a reader, or None with its complaint put on the list."""
    try:
        return read(*arguments)
    except KMergeError as error:
        problems.append(str(error))
        return None


def _cross_check(encoder: EncoderConfig | None, lora: PeftLoRA, facts: Base | None) -> list[str]:
    """What encoder, LoRA and base must agree on."""
    head = named_head(lora.head_weights) or lora.weights
    a, b = (head.get(f"{HEAD}.{name}") for name in ("lora_a", "lora_b"))
    hidden = encoder and encoder.hidden_size
    problems = []
    if hidden is not None and a is not None and a.shape[0] != hidden:
        problems.append(f"lm_head's LoRA reads {a.shape[0]} features, the encoder writes {hidden}")
    if facts is None:
        return problems
    if encoder is not None and base.scales_embeddings(facts.config):
        problems.append(
            f"{facts.by} scales embeddings inside the model, and the paper's code fed it "
            "unscaled ones: such a checkpoint has no equal here (docs/method.md, Gemma)"
        )
    fields = base.fingerprint(facts.config)
    for name, ours, whose in (
        ("hidden_size", hidden, "the encoder has"),
        ("vocab_size", None if b is None else b.shape[1], "lm_head's LoRA has"),
    ):
        if ours is not None and fields.get(name, ours) != ours:
            problems.append(f"{facts.by} has {name} {fields[name]}, {whose} {ours}")
    layers, covered = fields.get("num_hidden_layers"), lora.config.num_layers
    if is_int(layers) and covered > layers:
        problems.append(f"{facts.by} has {layers} layers, the LoRA covers {covered}")
    return problems


def named_head(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The head's LoRA tensors by their names in files."""
    return {f"{HEAD}.{name}": array for name, array in weights.items()}


def not_finite(tensors: Mapping[str, mx.array]) -> list[str]:
    """Which tensors are not numbers to compute with, one line each."""
    return tensor_problems(tensors, tensors) + [
        f"{name} holds NaN or infinite values: the training run diverged"
        for name, array in tensors.items()
        if not mx.isfinite(array).all().item()
    ]


def _provenance(folder: Path, source: str, config: dict[str, Any]) -> dict[str, Any]:
    provenance: dict[str, Any] = {"converter": f"kmerge-mlx {__version__}", "source": source}
    if isinstance(config.get("peft_version"), str):
        provenance["peft_version"] = config["peft_version"]
    for name in filter(lambda name: (folder / name).is_file(), PROVENANCE):
        try:
            size = (folder / name).stat().st_size
            large = size > MAX_PROVENANCE_BYTES
            content = (
                f"left out: {size} bytes" if large else read_json(folder / name, CheckpointError)
            )
        except CheckpointError as error:  # for people alone: a torn file is not in the way
            content = f"left out: {error}"
        provenance[name.removesuffix(".json")] = content
    return provenance


def _cast(adapter: Adapter, dtype: str) -> Adapter:
    lora, encoder, head = (
        {name: array.astype(base.DTYPES[dtype]) for name, array in tensors.items()}
        for tensors in (adapter.tuning_weights, adapter.encoder_weights, adapter.head_weights)
    )
    if large := not_finite(lora | encoder | named_head(head)):
        names = ", ".join(problem.split()[0] for problem in large)
        raise CheckpointError(f"`dtype` {dtype} cannot hold {names}: give float32 or bfloat16")
    return Adapter(adapter.merge, adapter.tuning, lora, encoder, head)
