"""Puts LoRA on a base model through mlx-lm, and loads tensors into modules strictly.

The LoRA of a tied output head lives in :class:`~kmerge_mlx.virtual_tokens.MergedEmbedding`.

Source: ``y = W x + scale * B A x`` (arXiv 2106.09685); names and shapes are mlx-lm's: ``lora_a``
is ``(in, r)``, ``lora_b`` is ``(r, out)``. Full fine-tuning is mlx-lm's ``fine_tune_type: full``:
the last ``num_layers`` layers whole, not the embedding table, the last norm or the output head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from kmerge_mlx.adapters.schema import FullConfig, LoRAConfig, LoRASpec
from kmerge_mlx.errors import AdapterError, findings

LORA_LAYERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding)
LORA_PARTS = ("lora_a", "lora_b")

# What mlx-lm puts LoRA on when no keys are given.
CARRIERS = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
CARRIERS += (nn.Embedding, nn.QuantizedEmbedding)


class FoldedLinear(nn.Module):
    """``x W + x A B`` with the scale in B, and both factors in the dtype that a model computes in.

    Two kernels beside the layer's own, where mlx-lm's ``LoRALinear`` takes four, and six where it
    computes in float32 on a model of half precision. For inference alone.

    Args:
        layer: mlx-lm's.
        dtype: What the model computes in.
    """

    def __init__(self, layer: LoRALinear, dtype: mx.Dtype):
        super().__init__()
        self.linear = layer.linear
        self.lora_a = layer.lora_a.astype(dtype)
        self.lora_b = (layer.scale * layer.lora_b).astype(dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.addmm(self.linear(x), x @ self.lora_a, self.lora_b)


def last_layers(model: nn.Module, num_layers: int) -> list[nn.Module]:
    """The layers that an adapter covers, as mlx-lm counts them: -1 or 0 means all."""
    return model.layers[-max(num_layers, 0) :]


def default_keys(model: nn.Module, num_layers: int = -1) -> tuple[str, ...]:
    """mlx-lm's own choice of modules for LoRA: every linear layer, router and experts included.

    Modules with a LoRA of their own kind (AFM 7's fused ones) are left out: adapter files have no
    place for it.
    """
    found = {
        name
        for layer in last_layers(model, num_layers)
        for name, module in layer.named_modules()
        if isinstance(module, CARRIERS) and not hasattr(module, "to_lora")
    }
    return tuple(sorted(found))


def attach(model: nn.Module, config: LoRAConfig) -> None:
    """Replaces the modules that ``config`` names by mlx-lm's LoRA layers, in place."""
    if missing := _missing(model, config):
        summary = "the base model does not have what the adapter changes"
        raise AdapterError(findings(summary, missing))
    if config.uniform is not None and config.keys:
        _convert(model, config.num_layers, config.uniform, config.dropout, list(config.keys))
    groups: dict[LoRASpec, list[str]] = defaultdict(list)
    for name, spec in config.modules.items():
        groups[spec].append(name)
    for spec, modules in groups.items():
        # Full paths never match inside a layer, so only mlx-lm's second pass, by path, acts.
        _convert(model, len(model.layers), spec, config.dropout, modules)


def _missing(model: nn.Module, config: LoRAConfig) -> list[str]:
    """What the config names and the model does not have, one line each."""
    modules = dict(model.named_modules())
    covered = last_layers(model, config.num_layers)
    known = modules.keys() | {name for layer in covered for name, _ in layer.named_modules()}
    missing = [name for name in config.modules if name not in modules]
    if config.num_layers > len(model.layers):
        missing.append(f"{config.num_layers} layers (the model has {len(model.layers)})")
    missing += [key for key in config.keys if key not in known]
    ends = tuple(f".{key}" for key in config.keys)
    missing += [
        f"{name} as a plain linear layer"
        for name, module in modules.items()
        if hasattr(module, "to_lora") and (name in config.modules or f".{name}".endswith(ends))
    ]
    return missing


def _convert(
    model: nn.Module, num_layers: int, spec: LoRASpec, dropout: float, keys: list[str]
) -> None:
    options = {"rank": spec.rank, "scale": spec.scale, "dropout": dropout, "keys": keys}
    try:
        linear_to_lora_layers(model, num_layers, options)
    except ValueError as error:
        raise AdapterError(f"the base model cannot carry this adapter: {error}") from error


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """mlx-lm's LoRA layers in a model, with their paths."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LORA_LAYERS)]


def fold(model: nn.Module, dtype: mx.Dtype) -> None:
    """Replaces mlx-lm's LoRA on linear layers by folded ones, in place.

    On experts and tables it stays: MLX multiplies by expert in float32 alone on the CPU.
    """
    found = [(path, m) for path, m in layers(model) if isinstance(m, LoRALinear)]
    model.update_modules(tree_unflatten([(path, FoldedLinear(m, dtype)) for path, m in found]))


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """The LoRA tensors of mlx-lm's layers in a model, by full name."""
    return {f"{path}.{part}": m[part] for path, m in layers(model) for part in LORA_PARTS}


def full_parameters(model: nn.Module, config: FullConfig) -> dict[str, mx.array]:
    """The parameters of the layers that full fine-tuning covers, by their names in the model."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {
        f"{paths[id(layer)]}.{name}": array
        for layer in last_layers(model, config.num_layers)
        for name, array in tree_flatten(layer.parameters())
    }


def check_full(model: nn.Module, config: FullConfig, name: str) -> None:
    """Refuses a model, called ``name``, that is quantized or has too few layers."""
    if config.num_layers > len(model.layers):
        raise AdapterError(
            f"{name} has {len(model.layers)} layers, full fine-tuning covers {config.num_layers}"
        )
    for parameter, array in full_parameters(model, config).items():
        if not mx.issubdtype(array.dtype, mx.floating):
            found = f"full fine-tuning changes {parameter}, which is quantized in {name}"
            raise AdapterError(f"{found}: use LoRA, or a base that is not quantized")


def tensor_problems(
    expected: Mapping[str, Any], found: Mapping[str, Any], packed: Collection[str] = ()
) -> list[str]:
    """Missing, extra and misshapen tensors, and those of a wrong dtype, one line each.

    Both name arrays, or shapes; ``packed`` names those of unsigned 32-bit integers, not of floats.
    """
    wanted = {name: tuple(getattr(array, "shape", array)) for name, array in expected.items()}
    shapes = {name: tuple(getattr(array, "shape", array)) for name, array in found.items()}
    problems = [f"{n} is missing, expected shape {wanted[n]}" for n in wanted if n not in shapes]
    problems += [f"{n} {shapes[n]} belongs to nothing here" for n in shapes if n not in wanted]
    problems += [
        f"{name} has shape {shapes[name]}, expected {shape}"
        for name, shape in wanted.items()
        if shapes.get(name, shape) != shape
    ]
    for name, array in found.items():
        dtype = getattr(array, "dtype", mx.float32)
        if name in packed and dtype != mx.uint32:
            problems.append(f"{name} has dtype {dtype}, expected {mx.uint32}")
        elif name not in packed and not mx.issubdtype(dtype, mx.floating):
            problems.append(f"{name} has dtype {dtype}, expected a floating-point dtype")
    return problems
