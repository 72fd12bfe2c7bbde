"""LoRA on a base model, attached through mlx-lm.

Owns: turning a :class:`LoRAConfig` into LoRA layers (uniform, or by module with
its own rank and scale), and loading tensors into a module strictly. The head of a tied model is
not here: it lives in :class:`~kmerge_mlx.virtual_tokens.MergedEmbedding`.

Source: ``y = W x + scale * B A x`` (arXiv 2106.09685); names and shapes are mlx-lm's: ``lora_a``
is ``(in, r)``, ``lora_b`` is ``(r, out)``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from kmerge_mlx.adapters.schema import LoRASpec
from kmerge_mlx.adapters.tuning import LoRAConfig
from kmerge_mlx.errors import AdapterError, findings

LORA_LAYERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding)
LORA_PARTS = ("lora_a", "lora_b")

# What mlx-lm puts LoRA on when no keys are given.
CARRIERS = (
    *(nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear),
    *(nn.Embedding, nn.QuantizedEmbedding),
)


def last_layers(model: nn.Module, num_layers: int) -> list[nn.Module]:
    """The layers that an adapter covers, as mlx-lm counts them: -1 or 0 means all."""
    return model.layers[-max(num_layers, 0) :]


def default_keys(model: nn.Module, num_layers: int = -1) -> tuple[str, ...]:
    """mlx-lm's own choice of modules for LoRA: every linear layer, router and experts included.

    Args:
        model: An mlx-lm model without LoRA.
        num_layers: How many of the last layers are to carry it; -1 for all.

    Returns:
        Module paths inside a layer, sorted. Modules with a LoRA of their own kind (AFM 7's fused
        ones) are left out: adapter files have no place for it.
    """
    found = {
        name
        for layer in last_layers(model, num_layers)
        for name, module in layer.named_modules()
        if isinstance(module, CARRIERS) and not hasattr(module, "to_lora")
    }
    return tuple(sorted(found))


def attach(model: nn.Module, config: LoRAConfig) -> None:
    """Replaces the modules that ``config`` names by mlx-lm's LoRA layers, in place.

    Args:
        model: An mlx-lm model.
        config: Which modules, with which rank and scale.

    Raises:
        AdapterError: Modules that the covered layers do not have, or that cannot carry LoRA; all
            are listed.
    """
    names = {name for name, _ in model.named_modules()}
    inside = {
        n for layer in last_layers(model, config.num_layers) for n, _ in layer.named_modules()
    }
    missing = [name for name in config.modules if name not in names]
    if config.num_layers > len(model.layers):
        missing.append(f"{config.num_layers} layers (the model has {len(model.layers)})")
    missing += [key for key in config.keys if key not in names | inside]
    ends = tuple(f".{key}" for key in config.keys)
    missing += [
        f"{name} as a plain linear layer"
        for name, module in model.named_modules()
        if hasattr(module, "to_lora") and (name in config.modules or f".{name}".endswith(ends))
    ]
    if missing:
        raise AdapterError(
            findings("the base model does not have what the adapter changes", missing)
        )
    if config.uniform is not None and config.keys:
        _convert(model, config.num_layers, config.uniform, config.dropout, list(config.keys))
    groups: dict[LoRASpec, list[str]] = defaultdict(list)
    for name, spec in config.modules.items():
        groups[spec].append(name)
    for spec, modules in groups.items():
        # Full paths never match inside a layer, so only mlx-lm's second pass, by path, acts.
        _convert(model, len(model.layers), spec, config.dropout, modules)


def _convert(
    model: nn.Module, num_layers: int, spec: LoRASpec, dropout: float, keys: list[str]
) -> None:
    parameters: dict[str, Any] = {
        "rank": spec.rank,
        "scale": spec.scale,
        "dropout": dropout,
        "keys": keys,
    }
    try:
        linear_to_lora_layers(model, num_layers, parameters)
    except ValueError as error:
        raise AdapterError(f"the base model cannot carry this adapter: {error}") from error


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """mlx-lm's LoRA layers in a model, with their paths."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LORA_LAYERS)]


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """The LoRA tensors of mlx-lm's layers in a model, by full name."""
    return {f"{path}.{part}": m[part] for path, m in layers(model) for part in LORA_PARTS}


def load_strictly(
    module: nn.Module,
    expected: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    where: str,
    packed: Collection[str] = (),
) -> None:
    """Loads tensors into a module after checking every name and shape.

    Args:
        module: Receives the tensors.
        expected: Parameter names to arrays or shapes; exactly these must be given.
        weights: Tensors by parameter name.
        where: The file they come from, for the error.
        packed: Names of those that hold unsigned 32-bit integers; the others are floating-point.

    Raises:
        AdapterError: Missing, extra or misshapen tensors, all of them listed with both shapes.
    """
    shapes = {n: tuple(getattr(e, "shape", e)) for n, e in expected.items()}
    problems = tensor_problems(shapes, {n: tuple(w.shape) for n, w in weights.items()})
    problems += dtype_problems(weights, packed)
    if problems:
        raise AdapterError(findings(where, problems))
    module.load_weights(list(weights.items()), strict=False)


def dtype_problems(weights: Mapping[str, mx.array], packed: Collection[str] = ()) -> list[str]:
    """Tensors of a dtype that they cannot have, one line each."""
    problems = []
    for name, array in weights.items():
        if name in packed:
            good, expected = array.dtype == mx.uint32, mx.uint32
        else:
            good, expected = mx.issubdtype(array.dtype, mx.floating), "a floating-point dtype"
        if not good:
            problems.append(f"{name} has dtype {array.dtype}, expected {expected}")
    return problems


def tensor_problems(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Missing, extra and misshapen tensors, one line each with both shapes."""
    problems = [f"{n} is missing, expected shape {expected[n]}" for n in expected if n not in found]
    problems += [f"{n} {found[n]} belongs to nothing here" for n in found if n not in expected]
    problems += [
        f"{n} has shape {found[n]}, expected {expected[n]}"
        for n in expected
        if n in found and found[n] != expected[n]
    ]
    return problems
