"""Converts a PEFT LoRA adapter to mlx-lm LoRA weights, without looking at the base model.

Source: LoraConfig of PEFT 0.21 and its saved tensor names
(``base_model.model.<module>.lora_A.weight``); mlx-lm's ``lora_a`` (in, r), ``lora_b`` (r, out),
scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from kmerge_mlx.adapters.folder import HEAD
from kmerge_mlx.adapters.schema import LoRAConfig, LoRASpec
from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.convert.patterns import NameRules, PatternError
from kmerge_mlx.errors import short

PREFIX = "base_model.model."

# What a PEFT tensor name ends with -> mlx-lm's name for its transpose.
SUFFIXES = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}

# Tensors that only repeat the base model. PEFT saves them when the head is a target.
COPIES = (".base_layer.weight", ".base_layer.bias")

# PEFT saves no adapter name; a raw state dict has its default one.
ADAPTER_NAME = re.compile(r"\.(lora_\w+|modules_to_save|token_adapter)\.default(?=\.|$)")

# Tensor name part -> why it cannot be converted.
REFUSED_TENSORS = (
    (".lora_magnitude_vector", "DoRA: retrain with use_dora=False, or merge it in PEFT"),
    (".lora_embedding_", "LoRA on the embedding: retrain without it in target_modules"),
    (".modules_to_save.", "modules_to_save: retrain with modules_to_save=None"),
    (".lora_B.bias", "lora_bias: retrain with lora_bias=False"),
    (".token_adapter.", "trainable tokens: retrain without trainable_token_indices"),
)

# Options that change nothing about how saved weights are applied.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
    *("eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config"),
    *("megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "task_type"),
}
REFUSED_OPTIONS = {
    "use_dora": "DoRA: retrain with use_dora=False, or merge it in PEFT",
    "modules_to_save": "whole trained modules: retrain with modules_to_save=None",
    "lora_bias": "trained LoRA biases: retrain with lora_bias=False",
    "trainable_token_indices": "trained tokens: retrain without it",
    "target_parameters": "LoRA on bare parameters: retrain with target_modules alone",
    "layer_replication": "replicated layers: retrain without it",
    "alora_invocation_tokens": "activated LoRA: retrain without it",
}


def _is_rank(value: Any) -> bool:
    return is_int(value, 1)


def _is_list(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(good, value))


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or _is_list(value, lambda name: isinstance(name, str))


def _is_pattern(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(good, value.values()))


# Option -> (what it must be, in code and in words); all but the first three may be null.
OPTIONS = {
    "r": (_is_rank, "a rank"),
    "lora_alpha": (is_number, "a number"),
    "target_modules": (_is_names, "a string or a list of strings"),
    "exclude_modules": (_is_names, "a string or a list of strings"),
    "layers_pattern": (_is_names, "a string or a list of strings"),
    "layers_to_transform": (lambda v: is_int(v) or _is_list(v, is_int), "layer numbers"),
    "lora_dropout": (lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": (lambda v: _is_pattern(v, _is_rank), "names and ranks"),
    "alpha_pattern": (lambda v: _is_pattern(v, is_number), "names and numbers"),
}
NEEDED = ("r", "lora_alpha", "target_modules")
HONOURED = {*OPTIONS, "init_lora_weights", "bias"}

# Ways to start that leave the base model's weights alone; the others (pissa, olora, corda, loftq,
# lora_ga) change them, so the adapter means nothing on the original base.
INIT_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


@dataclass
class PeftLoRA:
    """A converted LoRA.

    Args:
        config: Which modules carry it.
        weights: mlx-lm names to tensors.
        head: Rank and scale of the output head, or None.
        head_weights: ``lora_a`` (D, r), ``lora_b`` (r, V) of the head, or empty.
    """

    config: LoRAConfig
    weights: dict[str, mx.array] = field(default_factory=dict)
    head: LoRASpec | None = None
    head_weights: dict[str, mx.array] = field(default_factory=dict)


def lora_from_peft(
    config: Any,
    tensors: Mapping[str, mx.array],
    problems: list[str],
    head_is_a_layer: bool = False,
    num_layers: int | None = None,
    scales: Sequence[float] = (),
) -> PeftLoRA | None:
    """Converts a PEFT adapter.

    Args:
        config: The content of PEFT's ``adapter_config.json``.
        tensors: The content of ``adapter_model.safetensors`` or ``.bin``.
        problems: Receives everything wrong, one line each.
        head_is_a_layer: The base is known to have an ``lm_head`` of its own, so that the head's
            LoRA goes with the others and mlx-lm loads it too.
        num_layers: L, how many layers the base has, or None where it is not known.
        scales: Exact scales; one that the config gives to within the last bit is meant.

    Returns:
        The LoRA, or None if anything is wrong.
    """
    before = len(problems)
    problems += _config_problems(config)
    if len(problems) > before:
        return None
    pairs = _pairs(tensors, problems)
    try:
        rules = NameRules(config, list(pairs))
    except PatternError as error:
        problems.append(f"adapter_config.json: {error}")
        return None
    specs = {
        name: _spec(name, pair, config, rules, scales, problems) for name, pair in pairs.items()
    }
    problems += [
        f"{name} has LoRA tensors, but {objection}"
        for name in pairs
        if (objection := rules.objection(name)) is not None
    ]
    problems += [
        f"target_modules names {short(target)}, but no tensor belongs to it (if the base has no "
        "such module, remove it from adapter_config.json)"
        for target in rules.unused_targets()
    ]
    if len(problems) > before:
        return None
    head, head_weights = None, {}
    if not head_is_a_layer and HEAD in specs:
        head, head_weights = specs.pop(HEAD), pairs.pop(HEAD)
    weights = {
        f"{name}.{part}": array for name, pair in pairs.items() for part, array in pair.items()
    }
    return PeftLoRA(_lora_config(specs, config, rules, num_layers), weights, head, head_weights)


def _config_problems(config: Any) -> list[str]:
    """Everything in a PEFT config that is refused or malformed."""
    if not isinstance(config, dict):
        return ["adapter_config.json does not hold an object"]
    kind = config.get("peft_type")
    if kind != "LORA":
        what = "has no peft_type: it is not PEFT's" if kind is None else f"is of type {short(kind)}"
        return [f"adapter_config.json {what}; only LORA adapters convert"]
    problems = [
        f"{short(name)[1:-1]} = {short(value)} ({REFUSED_OPTIONS.get(name, 'not supported')})"
        for name, value in config.items()
        if name not in HARMLESS | HONOURED and value not in (None, False, [], {}, "")
    ]
    if (bias := config.get("bias", "none")) != "none":
        problems.append(f'bias = {short(bias)} (trained biases: retrain with bias="none")')
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in INIT_KEEPS_BASE:
        problems.append(
            f"init_lora_weights = {short(init)} (it may change the base: convert it to plain "
            "LoRA in PEFT, save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, (good, expected) in OPTIONS.items():
        value = config.get(name)
        if not good(value) and (value is not None or name in NEEDED):
            problems.append(f"{name} = {short(value)}, expected {expected}")
    if (
        isinstance(config.get("target_modules"), str)
        and config.get("layers_to_transform") is not None
    ):
        problems.append("layers_to_transform does not go with target_modules as one pattern")
    return [f"adapter_config.json: {problem}" for problem in problems]


def _pairs(tensors: Mapping[str, mx.array], problems: list[str]) -> dict[str, dict[str, mx.array]]:
    """Module path to its ``lora_a`` and ``lora_b``, transposed."""
    pairs: dict[str, dict[str, mx.array]] = {}
    for name, array in tensors.items():
        path = ADAPTER_NAME.sub(r".\1", name.removeprefix(PREFIX))
        reason = next((why for part, why in REFUSED_TENSORS if part in path), None)
        suffix = next((s for s in SUFFIXES if path.endswith(s)), "")
        module, shape = path.removesuffix(suffix), tuple(array.shape)
        if reason is not None:
            problems.append(f"tensor {name}: {reason}")
        elif path.endswith(COPIES):
            continue
        elif not suffix:
            problems.append(f"tensor {name} {shape} is not part of a LoRA")
        elif array.ndim != 2 or 0 in shape:
            problems.append(f"tensor {name} has shape {shape}, expected (r, in) or (out, r)")
        elif SUFFIXES[suffix] in pairs.setdefault(module, {}):
            problems.append(f"tensor {name} is there under two names")
        else:
            pairs[module][SUFFIXES[suffix]] = array.T
    if not pairs and not problems:
        problems.append("the adapter holds no LoRA tensors")
    return pairs


def _spec(
    name: str,
    pair: Mapping[str, mx.array],
    config: Mapping[str, Any],
    rules: NameRules,
    scales: Sequence[float],
    problems: list[str],
) -> LoRASpec | None:
    """Rank and scale of one module, after checking its two tensors against the config."""
    if absent := [suffix for suffix, part in SUFFIXES.items() if part not in pair]:
        problems.append(f"{name}{absent[0]} is missing")
        return None
    a, b = pair["lora_a"], pair["lora_b"]
    if a.shape[1] != b.shape[0]:
        problems.append(
            f"{name}: lora_A {(a.shape[1], a.shape[0])} and lora_B {(b.shape[1], b.shape[0])} do "
            "not fit together, expected (r, in) and (out, r)"
        )
        return None
    rank = rules.value("rank_pattern", name, config["r"])
    alpha = rules.value("alpha_pattern", name, config["lora_alpha"])
    if rank != a.shape[1]:
        problems.append(f"{name}: the tensors have rank {a.shape[1]}, the config says {rank}")
        return None
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoRASpec(rank, next((near for near in neighbours(scale) if near in scales), scale))


def neighbours(value: float) -> tuple[float, float, float]:
    """A float64 and the two beside it."""
    return value, math.nextafter(value, math.inf), math.nextafter(value, -math.inf)


def place(name: str) -> tuple[str, int | None, str]:
    """The stack of layers that a module is in, the layer's index, and the path inside the layer."""
    parts = name.split(".")
    for i, part in enumerate(parts[1:-1], 1):
        if part.isascii() and part.isdigit() and len(part) < 7 and part == str(int(part)):
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", None, name


def _lora_config(
    specs: Mapping[str, LoRASpec],
    config: Mapping[str, Any],
    rules: NameRules,
    num_layers: int | None,
) -> LoRAConfig:
    """mlx-lm's uniform form where it says the same, else module by module."""
    dropout = float(config.get("lora_dropout") or 0.0)
    places = [place(name) for name in specs]
    layers = {layer for _, layer, _ in places if layer is not None}
    covered = max(layers, default=-1) + 1
    # mlx-lm counts layers from the last: the uniform form is right only for the last of them.
    last = covered in (0, num_layers) or (num_layers is None and not rules.picks_layers)
    count = covered - min(layers, default=0) if num_layers is not None else covered
    keys: dict[str, set[int | None]] = {}
    for _, layer, inside in places:
        keys.setdefault(inside, set()).add(layer)
    stacks = {stack for stack, layer, _ in places if layer is not None}
    everywhere = len(stacks) <= 1 and all(
        where == {None} or (None not in where and len(where) == count) for where in keys.values()
    )
    uniform = set(specs.values())
    if everywhere and last and len(uniform) <= 1:
        spec = (
            uniform.pop() if uniform else LoRASpec(config["r"], config["lora_alpha"] / config["r"])
        )
        # mlx-lm reads 0 layers as all of them; a module outside the layers needs none.
        return LoRAConfig(max(count, min(len(keys), 1)), dropout, spec, tuple(keys))
    return LoRAConfig(covered, dropout, modules=dict(specs))
