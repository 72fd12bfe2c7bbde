"""A whole checkpoint folder in the authors' layout to an adapter folder.

Owns: finding the checkpoint (a folder, its best/last sub-folder, or a hub repo), reading its parts
without executing anything, the checks that need more than one part, and the report of everything
wrong at once.

Layout, as the authors' code writes it: one folder with ``encoder.pth``, ``adapter_config.json`` and
``adapter_model.safetensors`` (or ``.bin``), and ``metrics.json`` beside them. ``export`` writes the
same, and ``kmerge.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from kmerge_mlx.adapters.schema import BaseModelConfig, EncoderConfig, MergeConfig
from kmerge_mlx.config import is_int
from kmerge_mlx.convert.companion import COMPANION, Companion, read_companion
from kmerge_mlx.convert.encoder import encoder_from_torch
from kmerge_mlx.convert.peft import PeftLoRA, lora_from_peft
from kmerge_mlx.convert.torch_read import read_state_dict
from kmerge_mlx.errors import CheckpointError, KMergeError, ModelError, findings, first_line
from kmerge_mlx.files import read_json, read_safetensors
from kmerge_mlx.hub.fetch import fetch
from kmerge_mlx.prompts.policy import ALL, Layout

ENCODER = "encoder.pth"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
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
    if dtype is not None and dtype not in base.DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}, expected one of {', '.join(base.DTYPES)}")
    check_adapter_destination(destination, force)
    folder = find_checkpoint(source)
    known = None if model is None else read_base(model)
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
        inside = {path.parent for path in root.glob(f"*/{ENCODER}")}
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror}") from None
    for name in SUBFOLDERS:
        if root / name in inside:
            return root / name
    if len(inside) == 1:
        return inside.pop()
    if inside:
        names = ", ".join(sorted(path.name for path in inside))
        raise CheckpointError(f"{source} holds several checkpoints ({names}): name one of them")
    raise CheckpointError(
        f"{source} holds no {ENCODER} and no {PEFT_CONFIG}: expected a checkpoint folder "
        "as the K-Token-Merging code writes it"
    )


def read_base(model: str) -> Base:
    """Reads what converting needs of a base model: config and padding token, no weights.

    Raises:
        ModelError: It cannot be found or read.
    """
    path = base.resolve(model, weights=False)
    config = base.read_config(path)
    try:
        tokenizer = load_tokenizer(path)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{model}: its tokenizer cannot be read: {first_line(error)}") from error
    # A folder is recorded so that it can be found from anywhere.
    name = str(path.resolve()) if Path(model).is_dir() else model
    return Base(name, config, base.default_pad_token_id(tokenizer), f"--model {name}")


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
    companion = _collect(problems, read_companion, folder)
    facts = known or _companions_base(companion)
    encoder, encoder_weights = _read_encoder(folder, k, companion, problems)
    tensors = _collect(problems, _read_peft_tensors, folder)
    before = len(problems)
    config = _collect(problems, read_json, folder / PEFT_CONFIG, CheckpointError)
    lora = None
    if tensors is not None and len(problems) == before:
        lora = _lora(config, tensors, known, companion, problems)
    provenance = _provenance(folder, source, config)
    problems += not_finite(encoder_weights)
    if lora is not None:
        problems += not_finite(lora.weights | named_head(lora.head_weights))
        problems += _cross_check(encoder, lora, facts)
    if companion is not None:
        problems += _companion_problems(companion, encoder, known)
    if problems or lora is None:
        raise CheckpointError(findings(f"{source} cannot be converted", problems))
    recorded = config.get("base_model_name_or_path")
    if not isinstance(recorded, str) or not recorded.isprintable():
        recorded = None
    # The authors' code merges the whole prompt, and applies no chat template.
    layout, pad = Layout(ALL, chat_template=False), facts and facts.pad_token_id
    if companion is not None:
        layout, provenance = companion.merge.layout, provenance | companion.merge.provenance
        # What the encoder was trained with, even where that is not the tokenizer's default.
        pad = pad if companion.merge.pad_token_id is None else companion.merge.pad_token_id
    name, fields = (facts.id, base.fingerprint(facts.config)) if facts else (None, {})
    merge = MergeConfig(
        encoder=encoder,
        base=BaseModelConfig(name or recorded, fields),
        pad_token_id=pad,
        head_lora=lora.head,
        layout=layout,
        provenance=provenance,
    )
    return Adapter(merge, lora.config, lora.weights, encoder_weights, lora.head_weights)


def _lora(
    config: Any,
    tensors: Mapping[str, mx.array],
    known: Base | None,
    companion: Companion | None,
    problems: list[str],
) -> PeftLoRA | None:
    facts = known or _companions_base(companion)
    untied = facts is not None and base.is_tied(facts.config) is False
    if known is None and companion is not None and companion.merge.head_lora is not None:
        untied = False  # it may lie beside the encoder for all that
    layers = base.fingerprint(facts.config).get("num_hidden_layers") if facts else None
    scales = companion.scales if companion else ()
    return lora_from_peft(
        config, tensors, problems, untied, layers if is_int(layers) else None, scales
    )


def _companions_base(companion: Companion | None) -> Base | None:
    if companion is None:
        return None
    stated, pad = companion.merge.base, companion.merge.pad_token_id
    return Base(stated.id, dict(stated.fields), pad, f"the base in {COMPANION}")


def _companion_problems(
    companion: Companion, encoder: EncoderConfig | None, known: Base | None
) -> list[str]:
    """Where it contradicts the encoder or the base that are there."""
    differences = []
    if encoder is not None and (difference := companion.disagreement(encoder)):
        differences.append(difference)
    if known is not None:
        fields = base.fingerprint(known.config)
        differences += [f"{known.by}: {d}" for d in companion.merge.base.differences(fields)]
    return [f"{d} (says {COMPANION}; remove it to convert without it)" for d in differences]


def _read_encoder(
    folder: Path, k: int | None, companion: Companion | None, problems: list[str]
) -> tuple[EncoderConfig | None, dict[str, mx.array]]:
    merges = companion is None or companion.merge.encoder is not None
    if not merges and not (folder / ENCODER).exists():
        if k not in (None, 1):
            problems.append(f"{COMPANION} says K = 1, but --k is {k}: give --k 1 or leave it out")
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
    problems = []
    if encoder is not None and a is not None and a.shape[0] != encoder.hidden_size:
        d = encoder.hidden_size
        problems.append(f"lm_head's LoRA reads {a.shape[0]} features, the encoder writes {d}")
    if facts is None:
        return problems
    if encoder is not None and base.scales_embeddings(facts.config):
        problems.append(
            f"{facts.by} scales embeddings inside the model, and the paper's code fed it "
            "unscaled ones: such a checkpoint has no equal here (docs/method.md, Gemma)"
        )
    fields = base.fingerprint(facts.config)
    checks = (
        ("hidden_size", encoder and encoder.hidden_size, "the encoder has"),
        ("vocab_size", None if b is None else b.shape[1], "lm_head's LoRA has"),
    )
    problems += [
        f"{facts.by} has {name} {fields[name]}, {whose} {ours}"
        for name, ours, whose in checks
        if ours is not None and name in fields and fields[name] != ours
    ]
    layers, covered = fields.get("num_hidden_layers"), lora.config.num_layers
    if is_int(layers) and covered > layers:
        problems.append(f"{facts.by} has {layers} layers, the LoRA covers {covered}")
    return problems


def named_head(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The head's LoRA tensors by their names in files."""
    return {f"{HEAD}.{name}": array for name, array in weights.items()}


def not_finite(tensors: Mapping[str, mx.array]) -> list[str]:
    """Which tensors are no numbers to compute with, one line each."""
    problems = []
    for name, array in tensors.items():
        if not mx.issubdtype(array.dtype, mx.floating):
            problems.append(f"{name} has dtype {array.dtype}, expected a floating-point dtype")
        elif not mx.isfinite(array).all().item():
            problems.append(f"{name} holds NaN or infinite values: the training run diverged")
    return problems


def _read_or_say(path: Path) -> Any:
    """Provenance is for people: a file that a killed run tore must not stand in the way."""
    try:
        return read_json(path, CheckpointError)
    except CheckpointError as error:
        return f"left out: {error}"


def _provenance(folder: Path, source: str, config: Any) -> dict[str, Any]:
    provenance: dict[str, Any] = {"converter": f"kmerge-mlx {__version__}", "source": source}
    if isinstance(config, dict) and isinstance(config.get("peft_version"), str):
        provenance["peft_version"] = config["peft_version"]
    for name in PROVENANCE:
        if not (folder / name).is_file():
            continue
        if (size := (folder / name).stat().st_size) > MAX_PROVENANCE_BYTES:
            content = f"left out: {size} bytes"
        else:
            content = _read_or_say(folder / name)
        provenance[name.removesuffix(".json")] = content
    return provenance


def _cast(adapter: Adapter, dtype: str) -> Adapter:
    parts = (adapter.tuning_weights, adapter.encoder_weights, adapter.head_weights)
    cast = [
        {name: a.astype(base.DTYPES[dtype]) for name, a in tensors.items()} for tensors in parts
    ]
    lora, encoder, head = cast
    if large := not_finite(lora | encoder | named_head(head)):
        names = ", ".join(problem.split()[0] for problem in large)
        raise CheckpointError(f"--dtype {dtype} cannot hold {names}: give float32 or bfloat16")
    return Adapter(adapter.merge, adapter.tuning, *cast)
