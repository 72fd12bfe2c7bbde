"""PEFT's LoRA tensors and configs, made by hand, and their conversion: good, or refused.

The sizes are small and the numbers random; a test asks for the modules it needs by name.
"""

from __future__ import annotations

import mlx.core as mx

from kmerge_mlx.convert.peft import PREFIX, lora_from_peft
from tests.checkpoints import CONFIG

Q, V, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"


def tensors(*modules: str, rank: int = 4, inner: int = 8, out: int = 6) -> dict[str, mx.array]:
    """LoRA tensors under PEFT's names."""
    made = {}
    for name in modules:
        made[f"{PREFIX}{name}.lora_A.weight"] = mx.random.normal((rank, inner))
        made[f"{PREFIX}{name}.lora_B.weight"] = mx.random.normal((out, rank))
    return made


def layered(*inside: str, layers: tuple[int, ...] = (0, 1), **sizes: int) -> dict[str, mx.array]:
    names = [f"model.layers.{layer}.{name}" for layer in layers for name in inside]
    return tensors(*names, **sizes)


def config(**options: object) -> dict[str, object]:
    return CONFIG | {"target_modules": ["q_proj"]} | options


def converted(options: object, weights: dict[str, mx.array], **known: object):
    problems: list[str] = []
    lora = lora_from_peft(options, weights, problems, **known)
    assert not problems
    return lora


def refused(options: object, weights: dict[str, mx.array] | None = None) -> list[str]:
    problems: list[str] = []
    weights = layered(Q) if weights is None else weights
    assert lora_from_peft(options, weights, problems) is None
    assert problems
    assert all(p and "\n" not in p for p in problems)
    return problems
