"""Tiny random adapters and bases for tests that need no PyTorch."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import _get_classes

from kmerge_mlx.adapters.folder import Adapter
from kmerge_mlx.adapters.schema import EncoderConfig, LoRAConfig, LoRASpec, MergeConfig
from kmerge_mlx.base import find_embedding
from tests.conftest import UPSTREAM

PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
# What makes a mixture of experts of a Qwen2 config.
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 32}
EXPERTS |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 32}
EXPERTS |= {"norm_topk_prob": True}
PAD = 223
VOCAB_SIZE = 700


def random_adapter(
    model: nn.Module,
    k: int,
    keys: tuple[str, ...] = PROJECTIONS,
    head: bool = True,
    seed: int = 0,
    context: int = 0,
) -> Adapter:
    """An adapter with no weight at its initial value, for a plain (maybe quantized) model."""
    mx.random.seed(seed)
    _, table = find_embedding(model, "tiny")
    d, vocab_size = table(mx.array([0])).shape[-1], table.weight.shape[0]
    sizes = EncoderConfig(k, d, 2 * k * d, context) if k > 1 else None
    spec = LoRASpec(4, 2.0)
    weights = {}
    for name, module in model.named_modules():
        if any(name.endswith(f".{key}") for key in keys):
            out, inner = module.weight.shape
            if isinstance(module, nn.QuantizedLinear):
                inner = inner * 32 // module.bits
            weights[f"{name}.lora_a"] = _normal(inner, 4)
            weights[f"{name}.lora_b"] = _normal(4, out)
    shapes = sizes.shapes() if sizes else {}
    encoder = {name: _normal(*shape) for name, shape in shapes.items()}
    head_weights = {"lora_a": _normal(d, 4), "lora_b": _normal(4, vocab_size)} if head else {}
    merge = MergeConfig(sizes, pad_token_id=PAD, head_lora=spec if head else None)
    return Adapter(
        merge, LoRAConfig(len(model.layers), 0.0, spec, keys), weights, encoder, head_weights
    )


def write_base(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A random base model of any mlx-lm architecture, with the fixture's tokenizer.

    A ``quantization`` entry in the config quantizes it, as ``mlx_lm.convert -q`` would.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = build(config, seed)
    if "quantization" in config:
        nn.quantize(model, **config["quantization"])
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(UPSTREAM / "base" / name, folder / name)
    return folder


def build(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """A random mlx-lm model from a config."""
    mx.random.seed(seed)
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    model.eval()
    return model


def qwen2_config(**changes: Any) -> dict[str, Any]:
    """A Qwen2 config of the fixture's size."""
    return {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 700,
        "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    } | changes


def prompts_of(count: int, low: int = 1, high: int = 90, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(low, high))] for _ in range(count)
    ]


def steps(model, prompt, tokens=10, **options):
    """Tokens and log-probabilities by mlx-lm's own loop."""
    return list(generate_step(mx.array(prompt.ids), model, max_tokens=tokens, **options))


def _normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, scale=shape[0] ** -0.5)
