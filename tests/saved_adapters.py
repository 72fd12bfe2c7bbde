"""Small adapters made by hand: in memory, saved to a folder, or refused when they are loaded."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from kmerge_mlx.adapters.folder import Adapter, load_adapter, save_adapter
from kmerge_mlx.adapters.schema import (
    BaseModelConfig,
    EncoderConfig,
    LoRAConfig,
    LoRASpec,
    MergeConfig,
)
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.prompts.lay_out import ALL, Layout

D, R, V = 8, 2, 30
Q, UP = "self_attn.q_proj", "mlp.up_proj"


def make(k: int = 4, head: bool = True, by_module: bool = False, dtype=mx.float32) -> Adapter:
    mx.random.seed(k)
    sizes, spec = EncoderConfig(k, D, 12), LoRASpec(R, 8.0)
    names = [f"model.layers.{i}.{key}" for i in (0, 1) for key in (Q, UP)]
    weights = {}
    for name in names:
        weights[f"{name}.lora_a"] = mx.random.normal((D, R)).astype(dtype)
        weights[f"{name}.lora_b"] = mx.random.normal((R, 6)).astype(dtype)
    encoder = {n: mx.random.normal(s).astype(dtype) for n, s in sizes.shapes().items()}
    head_weights = {
        "lora_a": mx.random.normal((D, R)).astype(dtype),
        "lora_b": mx.random.normal((R, V)).astype(dtype),
    }
    merge = MergeConfig(
        sizes,
        BaseModelConfig("some/base", {"hidden_size": D, "vocab_size": V}),
        pad_token_id=7,
        head_lora=LoRASpec(R, 3.5) if head else None,
        layout=Layout(ALL),
        provenance={"metrics": {"accuracy": [0.5, None]}},
    )
    lora = (
        LoRAConfig(2, 0.05, modules=dict.fromkeys(names, spec))
        if by_module
        else LoRAConfig(2, 0.05, spec, (Q, UP))
    )
    return Adapter(merge, lora, weights, encoder, head_weights if head else {})


def saved(path: Path, **options) -> Path:
    save_adapter(make(**options), path)
    return path


def refused(path: Path, k: int | None = None) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, k)
    text = str(caught.value)
    assert text.splitlines()[0].isprintable()
    return text
