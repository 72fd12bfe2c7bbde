"""A base model and its adapter made into one model.

Owns: fusing LoRA into the base's weights, an output head of its own for a tied model whose head
carries LoRA, and what becomes of quantized layers. The merge encoder cannot be fused: the model's
folder carries it. Does not know the command line.

Source: ``mlx_lm.fuse``; ``W + scale * (A B)^T`` (arXiv 2106.09685). The head: DESIGN section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.utils import dequantize_model

from kmerge_mlx import base
from kmerge_mlx.adapters import lora
from kmerge_mlx.adapters.folder import HEAD, Adapter, adapter_folder, load_adapter
from kmerge_mlx.adapters.tuning import LoRAConfig
from kmerge_mlx.errors import ModelError
from kmerge_mlx.model import adapter_of, load, merged_embedding, output_head
from kmerge_mlx.tools import drift
from kmerge_mlx.tools.drift import Drift, Progress
from kmerge_mlx.tools.model_folder import (
    carried_merge,
    check_model_destination,
    made_by,
    reload,
    write_model,
    writing,
)
from kmerge_mlx.virtual_tokens import MergedEmbedding

SAVE_PATH = "--save-path"
_TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Fused:
    """What was written.

    Args:
        untied: Whether a tied model got an output head of its own.
        quantized: Whether it has quantized layers.
        merge_factor: K of the encoder that the folder carries; 1: it carries none.
        drift: How far it is from the base with the adapter on it.
    """

    untied: bool
    quantized: bool
    merge_factor: int
    drift: Drift


def fuse(
    path_or_hf_repo: str,
    adapter_path: str | Path,
    save_path: str | Path,
    k: int | None = None,
    *,
    dequantize: bool = False,
    text: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], Progress] | None = None,
) -> Fused:
    """Writes a base with its adapter as one model folder that carries its merge encoder.

    Args:
        path_or_hf_repo: Base model, a folder, a hub repo id, or ``bundled``.
        adapter_path: Adapter folder.
        save_path: The folder to write.
        k: Merge factor, or None: the adapter's only one.
        dequantize: Write floating-point weights. Otherwise layers that are quantized are quantized
            again, each by its own parameters.
        text: What the drift is measured on, or None: random token ids.
        force: Replace a model folder at ``save_path``.
        trust_remote_code: Let the base's own Python files run.
        progress: A label to what is called with (positions read, positions in all).

    Returns:
        What was written, and its drift.

    Raises:
        AdapterError: The adapter is torn, has no such K, or is for another base.
        ModelError: The base cannot be loaded or fused, or the folder cannot be written.
        PromptError: The text has no token.
    """
    where = adapter_folder(adapter_path, k)
    source = base.resolve(path_or_hf_repo)
    check_model_destination(save_path, force, SAVE_PATH, [source, where])
    adapter = load_adapter(where)
    model, tokenizer, config = load(
        path_or_hf_repo, where, return_config=True, trust_remote_code=trust_remote_code
    )
    name, bar = str(path_or_hf_repo), progress or (lambda _: lambda *_: None)
    sample = drift.sample(model, tokenizer, text)
    before = drift.read(model, sample, bar("Reading unfused"))
    encoder = adapter_of(model, adapter.merge, adapter.tuning).encoder_weights
    pad, untied = merged_embedding(model).pad_token_id, "lora_a" in merged_embedding(model)
    model, config = fused(model, config, name, dequantize)
    quantized = any(n.endswith(".scales") for n, _ in tree_flatten(model.parameters()))
    carried = None
    if encoder:
        merge = carried_merge(adapter.merge, config, pad, made_by("fused", name, adapter_path))
        carried = Adapter(replace(merge, head_lora=None), LoRAConfig(0), {}, encoder)
    with writing(save_path) as folder:
        write_model(folder, model, tokenizer, config, source, carried)
        del model
        model = reload(folder, trust_remote_code)
        found = drift.compare(before, drift.read(model, sample, bar("Reading fused")))
    return Fused(untied, quantized, 1 if carried is None else carried.merge.merge_factor, found)


def fused(
    model: nn.Module, config: Mapping[str, Any], name: str, dequantize: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Takes an adapter off a model and puts what it adds into the weights.

    Args:
        model: From :func:`kmerge_mlx.load` with an adapter; not to be used afterwards.
        config: The base's config.
        name: What to call the base in an error.
        dequantize: Make all weights floating-point.

    Returns:
        A plain mlx-lm model, its new weights not evaluated yet, and its config.

    Raises:
        ModelError: The model has a tied head with LoRA, and its class cannot have another head;
            or experts whose quantization mlx-lm cannot fuse.
    """
    config = deepcopy(dict(config))
    merged = merged_embedding(model)
    path, _ = next((p, m) for p, m in model.named_modules() if m is merged)
    model.update_modules(tree_unflatten([(path, merged.embedding)]))
    layers = lora.layers(model)
    experts = [layer.linear for _, layer in layers if isinstance(layer, LoRASwitchLinear)]
    if any(linear.get("global_scale") is not None for linear in experts):
        raise ModelError(
            f"{name} has experts quantized with a scale for each, which mlx-lm does not fuse: "
            "take a base that is not quantized so"
        )
    model.update_modules(
        tree_unflatten([(path, layer.fuse(dequantize=dequantize)) for path, layer in layers])
    )
    if "lora_a" in merged:
        model, config = _untied(model, config, merged, name, dequantize)
    if dequantize:
        model = dequantize_model(model)
        for entry in ("quantization", "quantization_config"):
            config.pop(entry, None)
    return model, config


def _untied(
    model: nn.Module,
    config: dict[str, Any],
    merged: MergedEmbedding,
    name: str,
    dequantize: bool,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the same class on the same arrays, with a head of its own: table and LoRA.

    Args:
        model: The tied model, its other LoRA fused.
        config: Its config.
        merged: What was around its embedding table, with the head's LoRA.
        name: What to call the base in an error.
        dequantize: Make the head floating-point; otherwise it is quantized like the table.

    Raises:
        ModelError: The class has no such head, or computes something else with one.
    """
    config = config | {_TIED: False}
    if isinstance(config.get("text_config"), Mapping):
        config["text_config"] = {**config["text_config"], _TIED: False}
    arguments = getattr(model, "args", None) or getattr(model, "config", None)
    made = None if arguments is None else type(model)(type(arguments).from_dict(config))
    head = None if made is None else output_head(made)
    if head is None:
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
        config["quantization"] = {**config["quantization"], head[0]: packing}
    return made, config


def _headless(model: nn.Module, name: str, why: str) -> ModelError:
    kind = getattr(model, "model_type", type(model).__module__.rsplit(".", 1)[-1])
    return ModelError(
        f"the adapter has LoRA on the output head of {name}, which is its embedding table, and "
        f"mlx-lm's {kind} models {why}: use the adapter unfused, or one without {HEAD}"
    )


def _as_linear(table: nn.Module, bias: bool) -> nn.Module:
    """The linear layer on a table's arrays that computes what the table does as a head."""
    if isinstance(table, nn.QuantizedEmbedding):
        packing = (table.group_size, table.bits, table.mode)
        linear = nn.QuantizedLinear(table.dims, table.num_embeddings, bias, *packing)
        linear.scales, linear.biases = table.scales, table.biases
    else:
        linear = nn.Linear(*table.weight.shape[::-1], bias)
    if bias:
        linear.bias = mx.zeros_like(linear.bias)
    linear.weight = table.weight
    return linear
