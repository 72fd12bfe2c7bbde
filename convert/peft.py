"""PEFT LoRA adapter to mlx-lm LoRA weights.

Owns the PEFT schema: which options are honoured, which are refused by name, and the table from
PEFT tensor names to mlx-lm's. Does not know base models: the tensors themselves name the modules
that were adapted, so no base is needed to convert.

Source: PEFT's LoraConfig and its saved tensor names (``base_model.model.<module>.lora_A.weight``);
matching rules of ``peft.tuners.tuners_utils.check_target_module_exists`` and
``peft.utils.other.get_pattern_key``; mlx-lm's ``lora_a`` (in, r), ``lora_b`` (r, out), scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import regex

from kmerge_mlx.adapter import HEAD
from kmerge_mlx.config import LoRAConfig, LoRASpec, is_int, is_number

PREFIX = "base_model.model."

# (what a PEFT tensor name ends with, mlx-lm's name, transposed).
SUFFIXES = (
    (".lora_A.weight", "lora_a", True),
    (".lora_B.weight", "lora_b", True),
)

# Tensors that only repeat the base model. PEFT saves one when the head is a target.
COPIES = (".base_layer.weight",)

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
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
}
HONOURED = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "target_modules", "init_lora_weights"),
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
# Ways to start that leave the base model's weights alone; the others (pissa, olora, corda, loftq,
# lora_ga) change them, so the adapter means nothing on the original base.
INIT_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")

# Names that an adapter's regex may be tried on for this long before it is refused.
REGEX_SECONDS = 2.0


@dataclass
class PeftLoRA:
    """A converted LoRA.

    Args:
        config: Which modules carry it.
        weights: mlx-lm names to tensors.
        head: Rank and scale of the output head, or None.
        head_weights: ``lora_a`` (D, r), ``lora_b`` (r, V) of the head, or empty.
        head_copy_shape: Shape of the base head's weight that PEFT saved along, or None.
    """

    config: LoRAConfig
    weights: dict[str, mx.array] = field(default_factory=dict)
    head: LoRASpec | None = None
    head_weights: dict[str, mx.array] = field(default_factory=dict)
    head_copy_shape: tuple[int, ...] | None = None


def lora_from_peft(
    config: Any,
    tensors: Mapping[str, mx.array],
    problems: list[str],
    head_is_a_layer: bool = False,
) -> PeftLoRA | None:
    """Converts a PEFT adapter.

    Args:
        config: The content of PEFT's ``adapter_config.json``.
        tensors: The content of ``adapter_model.safetensors`` or ``.bin``.
        problems: Receives everything wrong, one line each.
        head_is_a_layer: The base is known to have an ``lm_head`` of its own, so that the head's
            LoRA goes with the others and mlx-lm loads it too.

    Returns:
        The LoRA, or None where the config alone rules it out.
    """
    before = len(problems)
    problems += _config_problems(config)
    if len(problems) > before:
        return None
    pairs, copy_shape = _pairs(tensors, problems)
    try:
        specs = {name: _spec(name, pair, config, problems) for name, pair in pairs.items()}
        _check_targets(config, pairs, problems)
    except (regex.error, TimeoutError) as error:
        problems.append(f"adapter_config.json: a pattern cannot be matched: {error}")
    if len(problems) > before:
        return None
    head, head_weights = None, {}
    if not head_is_a_layer and HEAD in specs:
        head, head_weights = specs.pop(HEAD), pairs.pop(HEAD)
    weights = {
        f"{name}.{part}": array for name, pair in pairs.items() for part, array in pair.items()
    }
    return PeftLoRA(_lora_config(specs, config), weights, head, head_weights, copy_shape)


def _config_problems(config: Any) -> list[str]:
    """Everything in a PEFT config that is refused or malformed."""
    if not isinstance(config, dict):
        return ["adapter_config.json does not hold an object"]
    kind = config.get("peft_type")
    if kind != "LORA":
        what = "has no peft_type: it is not PEFT's" if kind is None else f"is of type {kind!r}"
        return [f"adapter_config.json {what}; only LORA adapters convert"]
    problems = [
        f"adapter_config.json: {name} = {_short(value)} ({REFUSED_OPTIONS[name]})"
        if name in REFUSED_OPTIONS
        else f"adapter_config.json: {name} = {_short(value)} is not supported"
        for name, value in config.items()
        if name not in HARMLESS | HONOURED and value not in (None, False, [], {}, "")
    ]
    if config.get("bias", "none") != "none":
        problems.append(
            f"adapter_config.json: bias = {_short(config['bias'])} (trained biases: retrain "
            'with bias="none")'
        )
    if config.get("init_lora_weights", True) not in INIT_KEEPS_BASE:
        problems.append(
            f"adapter_config.json: init_lora_weights = {_short(config['init_lora_weights'])} "
            "changed the base model: convert it to plain LoRA in PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return problems + _type_problems(config)


def _type_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if not is_int(config.get("r"), 1):
        problems.append(f"adapter_config.json: r = {_short(config.get('r'))}, expected a rank")
    alpha = config.get("lora_alpha")
    if not is_number(alpha):
        problems.append(f"adapter_config.json: lora_alpha = {_short(alpha)}, expected a number")
    if not is_number(config.get("lora_dropout") or 0.0):
        problems.append("adapter_config.json: lora_dropout is not a number")
    for name, good in (("rank_pattern", is_int), ("alpha_pattern", is_number)):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(good(v) for v in pattern.values()):
            problems.append(f"adapter_config.json: {name} is not an object of numbers")
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not _is_list_of(targets, str):
        problems.append("adapter_config.json: target_modules is neither a string nor a list")
    layers = config.get("layers_to_transform")
    if layers is not None and not is_int(layers) and not _is_list_of(layers, int):
        problems.append("adapter_config.json: layers_to_transform is not a list of layer numbers")
    return problems


def _pairs(
    tensors: Mapping[str, mx.array], problems: list[str]
) -> tuple[dict[str, dict[str, mx.array]], tuple[int, ...] | None]:
    """Module path to its ``lora_a`` and ``lora_b``, and the shape of the head's copy."""
    pairs: dict[str, dict[str, mx.array]] = {}
    copy_shape = None
    for name, array in tensors.items():
        short = name.removeprefix(PREFIX).replace(".default.", ".")
        reason = next((why for part, why in REFUSED_TENSORS if part in short), None)
        if reason is not None:
            problems.append(f"tensor {name}: {reason}")
        elif short.endswith(COPIES):
            copy_shape = tuple(array.shape)
        elif found := next((s for s in SUFFIXES if short.endswith(s[0])), None):
            suffix, ours, transposed = found
            pair = pairs.setdefault(short.removesuffix(suffix), {})
            pair[ours] = array.T if transposed and array.ndim == 2 else array
        else:
            problems.append(f"tensor {name} {tuple(array.shape)} is not part of a LoRA")
    if not pairs and not problems:
        problems.append("the adapter holds no LoRA tensors")
    return pairs, copy_shape


def _spec(
    name: str, pair: Mapping[str, mx.array], config: Mapping[str, Any], problems: list[str]
) -> LoRASpec | None:
    """Rank and scale of one module, after checking its two tensors against the config."""
    missing = {"lora_a": "lora_A", "lora_b": "lora_B"}
    absent = [theirs for ours, theirs in missing.items() if ours not in pair]
    if absent:
        problems.append(f"{name}: {absent[0]} is missing")
        return None
    a, b = pair["lora_a"], pair["lora_b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        theirs = [tuple(reversed(x.shape)) for x in (a, b)]
        problems.append(
            f"{name}: lora_A {theirs[0]} and lora_B {theirs[1]} do not fit together, "
            "expected (r, in) and (out, r)"
        )
        return None
    rank = _pattern_value(config.get("rank_pattern"), name, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
    if rank != a.shape[1]:
        problems.append(f"{name}: the tensors have rank {a.shape[1]}, the config says {rank}")
        return None
    return LoRASpec(rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches a whole suffix of the module path decides."""
    for key, value in (pattern or {}).items():
        if regex.match(rf"(.*\.)?({key})$", name, timeout=REGEX_SECONDS):
            return value
    return default


def _check_targets(
    config: Mapping[str, Any], pairs: Mapping[str, Any], problems: list[str]
) -> None:
    """Every adapted module must be one that the config asked for, or PEFT would not apply it."""
    strangers = [name for name in pairs if not _is_target(config, name)]
    problems += [
        f"{name} has LoRA tensors, but the config does not target it" for name in strangers
    ]
    targets = config["target_modules"]
    if isinstance(targets, list):
        unused = [t for t in targets if not any(_ends_with(name, t) for name in pairs)]
        problems += [f"target_modules names {t}, but no tensor belongs to it" for t in unused]


def _is_target(config: Mapping[str, Any], name: str) -> bool:
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if isinstance(targets, str):
        whole = targets.lower() == "all-linear"
        return whole or bool(regex.fullmatch(targets, name, timeout=REGEX_SECONDS))
    if not any(_ends_with(name, target) for target in targets):
        return False
    if layers is None or layers == [] or name in targets:
        return True
    return _layer(name) in ([layers] if isinstance(layers, int) else layers)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _layer(name: str) -> int | None:
    """The index of the layer a module is in: the first number in its path."""
    match = re.match(r".*?\.[^.]*\.(\d{1,6})\.", f".{name}")
    return int(match[1]) if match else None


def _lora_config(specs: Mapping[str, LoRASpec], config: Mapping[str, Any]) -> LoRAConfig:
    """mlx-lm's uniform form where it says the same, else module by module."""
    dropout = float(config.get("lora_dropout") or 0.0)
    layers = {name: _layer(name) for name in specs}
    num_layers = max((n for n in layers.values() if n is not None), default=-1) + 1
    keys: dict[str, set[int]] = {}
    for name, layer in layers.items():
        inside = name if layer is None else name.split(f".{layer}.", 1)[1]
        keys.setdefault(inside, set()).add(-1 if layer is None else layer)
    everywhere = all(where in ({-1}, set(range(num_layers))) for where in keys.values())
    uniform = set(specs.values())
    if everywhere and len(uniform) <= 1 and config.get("layers_to_transform") is None:
        spec = uniform.pop() if uniform else LoRASpec(config["r"], config["lora_alpha"])
        return LoRAConfig(num_layers, dropout, spec, tuple(keys))
    return LoRAConfig(num_layers, dropout, modules=dict(specs))


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, Iterable) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
