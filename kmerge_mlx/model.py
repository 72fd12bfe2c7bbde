"""Base model + tokenizer + adapter -> a model that takes virtual token ids.

Owns loading, the check that an adapter fits its base, and the wiring: LoRA layers, the wrapped
embedding, the head. What comes out is mlx-lm's own model object: everything in mlx-lm that takes
token ids takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from kmerge_mlx import base, lora
from kmerge_mlx.adapter import HEAD, Adapter, load_adapter
from kmerge_mlx.blocks import MergedEmbedding
from kmerge_mlx.config import MAX_BLOCKS, LoRAConfig, is_int
from kmerge_mlx.encoder import MergeEncoder
from kmerge_mlx.errors import AdapterError, ModelError, findings, first_line


def load(
    path_or_hf_repo: str,
    adapter_path: str | Path | None = None,
    k: int | None = None,
    *,
    tokenizer_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
    max_blocks: int = MAX_BLOCKS,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Loads a base model and an adapter, as ``mlx_lm.load`` does (the adapter comes second here).

    Args:
        path_or_hf_repo: Base model, a folder or a hub repo id.
        adapter_path: Adapter folder (see ``adapter.py``); None loads the base alone, and prompts
            are then read unmerged.
        k: Merge factor wanted; None takes the adapter's only one.
        tokenizer_config: Further arguments for the tokenizer.
        revision: Hub revision of the base.
        lazy: Leave the base's weights unevaluated.
        trust_remote_code: Let the base's own Python files run.
        max_blocks: Slots of the block table.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelError: The base cannot be found, loaded or given virtual ids.
        AdapterError: The adapter is torn, has no such K, or is for another base.
    """
    if adapter_path is None and k not in (None, 1):
        raise AdapterError(f"--k {k} needs a merge encoder: give --adapter-path")
    adapter = None if adapter_path is None else load_adapter(adapter_path, k)
    path = base.resolve(path_or_hf_repo, revision)
    config = base.read_config(path)
    if adapter is not None:
        check_fit(adapter, config, str(path_or_hf_repo))
    try:
        model, _ = load_model(
            path, lazy=lazy, model_config=config, trust_remote_code=trust_remote_code
        )
        tokenizer = load_tokenizer(
            path,
            {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
            eos_token_ids=config.get("eos_token_id"),
        )
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ModelError(f"cannot load {path_or_hf_repo}: {first_line(error)}") from error
    # Plain attribute, not a parameter: generation compares prompts with it.
    model.context_length = base.context_length(config)
    if adapter is not None:
        pad = adapter.merge.pad_token_id
        pad = base.default_pad_token_id(tokenizer) if pad is None else pad
        attach(model, adapter, pad, name=str(path_or_hf_repo), max_blocks=max_blocks)
    return model, tokenizer


def check_fit(adapter: Adapter, config: Mapping[str, Any], name: str) -> None:
    """Refuses a base model that an adapter was not made for.

    Args:
        adapter: The adapter.
        config: The base's normalised config.
        name: What to call the base.

    Raises:
        AdapterError: Every difference, listed.
    """
    fields = base.fingerprint(config)
    problems = adapter.merge.base.differences(fields)
    known = {problem.split()[0] for problem in problems}
    d, width = adapter.merge.encoder.hidden_size, fields.get("hidden_size")
    if "hidden_size" not in known and is_int(width) and width != d:
        problems.append(f"hidden_size is {width}, the encoder has {d}")
    covered, layers = adapter.lora.num_layers, fields.get("num_hidden_layers")
    if "num_hidden_layers" not in known and is_int(layers) and layers < covered:
        problems.append(f"it has {layers} layers, the LoRA covers {covered}")
    if problems:
        made_for = adapter.merge.base.id
        made_for = f" (it was made for {made_for})" if made_for else ""
        raise AdapterError(findings(f"the adapter does not fit {name}{made_for}", problems))


def attach(
    model: nn.Module,
    adapter: Adapter,
    pad_token_id: int,
    name: str = "the base model",
    max_blocks: int = MAX_BLOCKS,
) -> None:
    """Puts an adapter on a loaded base model, in place.

    Args:
        model: A freshly loaded mlx-lm model.
        adapter: What to put on it.
        pad_token_id: Token that fills the last block.
        name: What to call the base in an error.
        max_blocks: Slots of the block table.

    Raises:
        ModelError: The model cannot take virtual ids.
        AdapterError: Tensors or modules that do not fit (all of them listed).
    """
    path, embedding = base.find_embedding(model, name)
    if not 0 <= pad_token_id < embedding.weight.shape[0]:
        raise AdapterError(f"pad_token_id {pad_token_id} is outside the vocabulary of {name}")
    merged = MergedEmbedding(
        embedding, MergeEncoder(adapter.merge.encoder), pad_token_id, max_blocks
    )
    shapes = adapter.merge.encoder.shapes()
    lora.load_strictly(merged.encoder, shapes, adapter.encoder_weights, "the merge encoder")
    lora.attach(model, adapter.lora)
    expected = lora.parameters(model)
    lora.load_strictly(model, expected, adapter.lora_weights, "the LoRA does not fit " + name)
    if adapter.merge.head_lora is not None:
        _attach_head(model, merged, adapter, name)
    model.update_modules(tree_unflatten([(path, merged)]))
    mx.eval(merged.encoder.parameters())
    model.eval()
    if getattr(model, "model_type", None) not in base.PROVEN:
        _probe(model, merged, name)


def merged_embedding(model: nn.Module) -> MergedEmbedding | None:
    """The wrapped embedding of a model, or None for a base model without an adapter."""
    return next((m for _, m in model.named_modules() if isinstance(m, MergedEmbedding)), None)


def _attach_head(model: nn.Module, merged: MergedEmbedding, adapter: Adapter, name: str) -> None:
    """The output head's LoRA: an ordinary LoRA layer, or inside the embedding of a tied model."""
    where = f"the output head's LoRA does not fit {name}"
    spec = adapter.merge.head_lora
    head = next((p for p, _ in model.named_modules() if p.rsplit(".", 1)[-1] == HEAD), None)
    if head is not None:
        lora.attach(model, LoRAConfig(0, adapter.lora.dropout, modules={head: spec}))
        layer = dict(model.named_modules())[head]
        lora.load_strictly(
            layer, {n: layer[n] for n in ("lora_a", "lora_b")}, adapter.head_weights, where
        )
    else:
        merged.add_head_lora(spec)
        expected = {n: merged[n] for n in ("lora_a", "lora_b")}
        lora.load_strictly(merged, expected, adapter.head_weights, where)


def _probe(model: nn.Module, merged: MergedEmbedding, name: str) -> None:
    """Tries a virtual id, and the head's LoRA, on an architecture the tests do not cover."""
    merged.head_calls = 0
    token = merged.pad_token_id
    base.probe(model, token, merged.stand_in(token), name)
    if "lora_a" in merged and not merged.head_calls:
        raise ModelError(
            f"{name} does not use its embedding table through as_linear, so the output head's "
            "LoRA would be ignored: use an adapter without lm_head"
        )
