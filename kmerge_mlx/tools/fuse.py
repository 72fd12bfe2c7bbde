"""Makes one model of a base and its adapter, and writes model folders that carry an adapter.

Source: ``mlx_lm.fuse``, ``mlx_lm.utils.save``; ``W + scale * (A B)^T`` (arXiv 2106.09685).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, dequantize_model, save

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters import lora
from kmerge_mlx.adapters.folder import (
    HEAD,
    Adapter,
    check_adapter_destination,
    read_adapter,
    write_adapter,
)
from kmerge_mlx.adapters.schema import BaseModelConfig, LoRAConfig, MergeConfig
from kmerge_mlx.config import CARRIED, DRIFT_BYTES, DRIFT_CHUNK, DRIFT_POSITIONS
from kmerge_mlx.errors import AdapterError, ModelError, PromptError, first_line
from kmerge_mlx.files import check_destination, flush, replacing_folder, write_error
from kmerge_mlx.model import adapter_of, load_source, merged_embedding, output_head, unfolded
from kmerge_mlx.prompts.segments import Segment, wants_special_tokens
from kmerge_mlx.source import Source
from kmerge_mlx.virtual_tokens import MergedEmbedding

Bars = Callable[[str], Callable[[int, int], None]]
"""A label to what is called with (positions read, positions in all)."""

OWN_PATTERNS = (*DEFAULT_ALLOW_PATTERNS, "README.md", CARRIED)
"""Files that a model folder may hold; a folder with others is never replaced."""

_CHARACTERS = 32  # of a token, at most: so much of a text is read for each one that is wanted


@dataclass(frozen=True)
class Gap:
    """How far log-probabilities moved; all are absolute differences."""

    positions: int  # compared, each with V log-probabilities
    max: float
    mean: float
    same: float  # share of positions whose likeliest token stayed


@dataclass(frozen=True)
class Drift:
    """How far a model moved; the last four are None where nothing merges."""

    plain: Gap  # after prompts that are read token by token
    merged: Gap | None = None  # after prompts whose blocks are merged
    blocks: int | None = None
    embeddings_mean: float | None = None  # norm of a merged embedding's difference over its norm
    embeddings_max: float | None = None


@dataclass(frozen=True)
class Fused:
    """What was written."""

    untied: bool  # whether a tied model got an output head of its own
    quantized: bool  # whether it has quantized layers
    merge_factor: int  # K of the encoder that the folder carries; 1: none
    drift: Drift | None  # from the base with the adapter on it; None: Ctrl-C ended its measuring


def fuse(
    source: Source,
    save_path: str | Path,
    *,
    dequantize: bool = False,
    text: str | None = None,
    force: bool = False,
    progress: Bars | None = None,
) -> Fused:
    """Writes a base with its adapter as one model folder that carries its merge encoder.

    Layers that are quantized are quantized again, each by its own parameters, unless ``dequantize``
    is on. The drift is measured on ``text``, or on random token ids.
    """
    if source.adapter is None:
        raise AdapterError(f"{source.model} carries no adapter to fuse: give `adapter_path`")
    check_model_destination(save_path, "save_path", force, source)
    model, tokenizer, config = load_source(source, fold=False)
    comparison = Comparison(model, tokenizer, text, progress)
    adapter = read_adapter(source.adapter, source.merge)
    own = adapter_of(model, adapter.merge, adapter.tuning)
    pad, untied = merged_embedding(model).pad_token_id, "lora_a" in merged_embedding(model)
    model, config = fused(model, config, source.model, dequantize)
    carried = None
    if own.encoder_weights:
        merge = replace(carried_merge("fused", source, config, pad), head_lora=None)
        folder = own.encoder_folder
        carried = Adapter(merge, LoRAConfig(0), {}, own.encoder_weights, encoder_folder=folder)
    quantized = base.has_quantized_layers(model)
    drift = write_model(save_path, source, model, tokenizer, config, carried, comparison)
    return Fused(untied, quantized, 1 if carried is None else source.k, drift)


def fused(
    model: nn.Module, config: Mapping[str, Any], name: str, dequantize: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Takes an adapter off a model and puts what it adds into the weights.

    The model is not to be used afterwards. What comes back is a plain mlx-lm model, its new weights
    not evaluated yet, and its config.
    """
    config, merged = deepcopy(dict(config)), unfolded(model)
    path, _ = next((p, m) for p, m in model.named_modules() if m is merged)
    model.update_modules(tree_unflatten([(path, merged.embedding)]))
    layers = lora.layers(model)
    experts = [layer.linear for _, layer in layers if isinstance(layer, LoRASwitchLinear)]
    if any(linear.get("global_scale") is not None for linear in experts):
        found = f"{name} has experts quantized with a scale for each"
        raise ModelError(f"{found}, which mlx-lm does not fuse: take a base without")
    plain = [(path, layer.fuse(dequantize=dequantize)) for path, layer in layers]
    model.update_modules(tree_unflatten(plain))
    if "lora_a" in merged:
        model, config = _untied(model, config, merged, name, dequantize)
    if dequantize:
        model = dequantize_model(model)
        for entry in ("quantization", "quantization_config"):
            config.pop(entry, None)
    return model, config


def _untied(
    model: nn.Module, config: dict[str, Any], merged: MergedEmbedding, name: str, dequantize: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the same class on the same arrays, with a head of its own: table and LoRA."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    arguments = getattr(model, "args", None) or getattr(model, "config", None)
    made = None if arguments is None else type(model)(type(arguments).from_dict(config))
    if made is None or (head := output_head(made)) is None:
        raise _headless(model, name, "have no output head of their own")
    made.update_modules(model.leaf_modules())
    made.update(model.parameters())
    made.eval()
    linear = _as_linear(merged.embedding, "bias" in head[1])
    made.update_modules(tree_unflatten([(head[0], linear)]))
    ids = mx.array([[merged.pad_token_id]])
    tied, own = (m(ids).astype(mx.float32) for m in (model, made))
    # Weights that overflowed give NaN on both sides; the drift refuses them.
    if mx.abs(tied - own).max().item() > 1e-2 * mx.abs(tied).max().item():
        raise _headless(model, name, "compute something else with an output head of their own")
    carrier = LoRALinear.from_base(linear, merged.lora_a.shape[-1], scale=merged.head_scale)
    carrier.lora_a, carrier.lora_b = merged.lora_a, merged.lora_b
    made.update_modules(tree_unflatten([(head[0], carrier.fuse(dequantize=dequantize))]))
    if isinstance(linear, nn.QuantizedLinear) and isinstance(config.get("quantization"), dict):
        packing = {name: getattr(linear, name) for name in ("group_size", "bits", "mode")}
        config["quantization"][head[0]] = packing
    return made, config


def _headless(model: nn.Module, name: str, why: str) -> ModelError:
    kind = getattr(model, "model_type", type(model).__module__.rsplit(".", 1)[-1])
    found = f"the adapter has LoRA on the output head of {name}, which is its embedding table"
    advice = f"use the adapter unfused, or one without {HEAD}"
    return ModelError(f"{found}, and mlx-lm's {kind} models {why}: {advice}")


def _as_linear(table: nn.Module, bias: bool) -> nn.Module:
    """The linear layer on a table's arrays that computes what the table does as a head."""
    if isinstance(table, nn.QuantizedEmbedding):
        packing = (table.group_size, table.bits, table.mode)
        linear = nn.QuantizedLinear(table.dims, table.num_embeddings, bias, *packing)
    else:
        linear = nn.Linear(*table.weight.shape[::-1], bias)
    linear.update(table.parameters())
    if bias:
        linear.bias = mx.zeros_like(linear.bias)
    return linear


def check_model_destination(path: str | Path, setting: str, force: bool, source: Source) -> None:
    """Refuses to write a model over something else, or over what it is made from."""
    path = Path(path)
    try:
        here = path.resolve()
        for read in (source.path, source.adapter):
            if read is not None and here in (read.resolve(), *read.resolve().parents):
                raise ModelError(f"`{setting}` {path} would replace {read}, which is read")
    except OSError as e:
        raise ModelError(f"cannot write {path}: {e.strerror}") from None
    check_destination(path, force, "model", OWN_PATTERNS, ModelError, marker="config.json")
    check_adapter_destination(path / CARRIED, force)


def write_model(
    path: str | Path,
    source: Source,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: Mapping[str, Any],
    adapter: Adapter | None,
    comparison: Comparison,
) -> Drift | None:
    """Writes a model folder, whole or not at all, and compares what it holds with its source.

    Ctrl-C while it compares keeps the folder, and gives None.

    The source's Python files and generation settings come along. The model, which has no adapter,
    is empty afterwards, so that its memory is free. ``adapter`` is what the folder is to carry.
    """
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    try:
        with replacing_folder(Path(path)) as folder:
            try:
                save(folder, source.path, model, tokenizer, deepcopy(dict(config)))
            except RuntimeError as e:
                raise write_error(e, folder, size) from e
            if adapter is not None:
                (folder / CARRIED).mkdir()
                write_adapter(adapter, folder / CARRIED)
            for file in filter(Path.is_file, folder.iterdir()):
                flush(file)
            written = Source.find(str(folder), trust_remote_code=source.trust_remote_code)
            try:
                return comparison.with_model(load_source(written)[0])
            except KeyboardInterrupt:  # all of it is written: only the comparison ends
                return None
    except OSError as e:
        raise ModelError(f"cannot write {path}: {e.strerror or first_line(e)}") from e


def carried_merge(how: str, source: Source, config: Mapping[str, Any], pad: int) -> MergeConfig:
    """What an adapter says of itself once a model folder carries it: ``how`` the folder was made.

    The base is the folder around it, wherever that is, so it has no id.
    """
    provenance = {f"{how}_by": f"kmerge-mlx {__version__}", "base_model": source.model}
    provenance |= {"adapter": source.adapter_path, "before": dict(source.merge.provenance)}
    made_on = BaseModelConfig(None, base.fingerprint(config))
    return replace(source.merge, base=made_on, pad_token_id=pad, provenance=provenance)


class Comparison:
    """What a model says of a text, or of random ids, to compare another model with it.

    The log-probabilities take bounded memory, which decides how many positions are compared.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, text: str | None, progress: Bars | None = None
    ):
        self._progress = progress or (lambda _: lambda *_: None)
        embedding = merged_embedding(model)
        k = 1 if embedding is None else embedding.merge_factor
        vocab_size = base.find_embedding(model, "the model")[1].weight.shape[0]
        kept = min(DRIFT_POSITIONS, DRIFT_BYTES // (4 * vocab_size))
        each = max(1, kept if k == 1 else kept // 2)  # positions of a prompt
        each = min(each, model.context_length or each)
        if text is None:
            draw, known = random.Random(0), min(vocab_size, len(tokenizer))
            ids = [draw.randrange(known) for _ in range(each * k)]
        else:
            start = text[: each * k * _CHARACTERS]
            special = wants_special_tokens(tokenizer, text)
            # Not verbose: a text past the model's context is cut, and no reason for a warning.
            ids = tokenizer.encode(start, add_special_tokens=special, verbose=False)[: each * k]
        if not ids:
            raise PromptError("the FILEs hold no token: give a text to measure the drift on")
        self.plain, self.merged = ids[:each], ids if k > 1 else []
        self._before = self._read(model, "Reading the source")

    def with_model(self, model: nn.Module) -> Drift:
        """How far another model is from the first; one that gives NaN is a ModelError."""
        (rows, plain, *merged), (other, *others) = self._before, self._read(model, "Reading back")
        gap = _gap(plain, others[0])
        if rows is None:
            return Drift(gap)
        moved = mx.linalg.norm(other - rows, axis=-1)
        moved = moved / mx.maximum(mx.linalg.norm(rows, axis=-1), 1e-30)
        far = moved.mean().item(), moved.max().item()
        return Drift(gap, _gap(merged[0], others[1]), moved.size, *far)

    def _read(self, model: nn.Module, label: str) -> tuple[Any, ...]:
        """Merged embeddings ``(N, D)`` or None, and log-probabilities ``(n, V)`` in chunks."""
        prompts, rows = [self.plain], None
        if self.merged:
            embedding = merged_embedding(model)
            prompts.append(embedding.compress([Segment(self.merged)]).ids)
            rows = embedding(mx.array(prompts[1])).astype(mx.float32)
            mx.eval(rows)
        total, done, bar = sum(map(len, prompts)), 0, self._progress(label)
        found: list[list[mx.array]] = []
        for prompt in prompts:
            chunks, cache = [], make_prompt_cache(model)
            for start in range(0, len(prompt), DRIFT_CHUNK):
                ids = mx.array([prompt[start : start + DRIFT_CHUNK]])
                logits = model(ids, cache=cache)[0].astype(mx.float32)
                chunks.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
                mx.eval(chunks[-1], [c.state for c in cache])
                done += ids.size
                bar(done, total)
            found.append(chunks)
        return rows, *found


def _gap(before: Sequence[mx.array], after: Sequence[mx.array]) -> Gap:
    largest, total, same, positions, numbers = 0.0, 0.0, 0, 0, 0
    for old, new in zip(before, after, strict=True):
        # Equal infinities (tokens that a model rules out) are not a difference.
        gap = mx.where(old == new, 0.0, mx.abs(new - old))
        largest = max(largest, gap.max().item())
        total += gap.sum().item()
        same += (old.argmax(-1) == new.argmax(-1)).sum().item()
        positions, numbers = positions + old.shape[0], numbers + gap.size
    if not isfinite(total):
        found = "the model that was made gives log-probabilities that are not finite"
        raise ModelError(f"{found}: its dtype cannot hold what the adapter adds")
    return Gap(positions, largest, total / numbers, same / positions)
