"""Converts a PEFT LoRA adapter to mlx-lm LoRA weights, without looking at the base model.

Source: LoraConfig of PEFT 0.21, its saved tensor names
(``base_model.model.<module>.lora_A.weight``) and its ``check_target_module_exists`` and
``get_pattern_key``; mlx-lm's ``lora_a`` (in, r), ``lora_b`` (r, out), scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import mlx.core as mx

from kmerge_mlx.adapters.folder import HEAD, Adapter, name_ends
from kmerge_mlx.adapters.schema import LoRAConfig, LoRASpec, MergeConfig
from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.convert.names import (
    ADAPTER_NAME,
    COPIES,
    SUFFIXES,
    in_causal_lm,
    place,
    unwrapped,
)
from kmerge_mlx.errors import CheckpointError, short

MAX_REPEATS = 10_000  # the product of all {n}: repeats of repeats can take all memory

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
    *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio"),  # ms-swift's, of its optimizer
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


def _holds(kind: type, value: Any, good: Callable[[Any], bool]) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, kind) and all(map(good, items))


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or _holds(list, value, lambda name: isinstance(name, str))


# Option -> (what it must be, in code and in words); all but the first three may be null.
OPTIONS = {
    "r": (_is_rank, "a rank"),
    "lora_alpha": (is_number, "a number"),
    "target_modules": (_is_names, "a string or a list of strings"),
    "exclude_modules": (_is_names, "a string or a list of strings"),
    "layers_pattern": (_is_names, "a string or a list of strings"),
    "layers_to_transform": (lambda v: is_int(v) or _holds(list, v, is_int), "layer numbers"),
    "lora_dropout": (lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": (lambda v: _holds(dict, v, _is_rank), "names and ranks"),
    "alpha_pattern": (lambda v: _holds(dict, v, is_number), "names and numbers"),
}
NEEDED = ("r", "lora_alpha", "target_modules")
NAMED = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
"""Options that name modules."""
HONOURED = {*OPTIONS, "init_lora_weights", "bias"}

ZERO_3 = (
    "DeepSpeed's ZeRO-3 writes such files: gather the weights before they are saved, with "
    "stage3_gather_16bit_weights_on_model_save or deepspeed.zero.GatheredParameters"
)

# Ways to start that leave the base model's weights alone; the others (pissa, olora, corda, loftq,
# lora_ga) change them, so the adapter means nothing on the original base.
INIT_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def _unwrapped_option(value: Any) -> Any:
    if isinstance(value, list):
        return [_unwrapped_option(item) for item in value]
    if isinstance(value, dict):
        return {unwrapped(key): item for key, item in value.items()}
    return unwrapped(value) if isinstance(value, str) else value


def copies_of_base(tensors: Mapping[str, mx.array], below_lora: bool = True) -> dict[str, str]:
    """The tensors that belong to no LoRA, by name, each with the name of what it may copy.

    PEFT saves the base's embedding and head, too, if their size was changed, or where it cannot
    tell; ``below_lora``: and those that it saves with a LoRA on them, as ``base_layer``.
    """
    lora = ("lora_", *(part for part, _ in REFUSED_TENSORS))
    paths = {name: unwrapped(name) for name in tensors}
    return {
        name: in_causal_lm(path.replace(".base_layer.", "."))
        for name, path in paths.items()
        if (below_lora or not path.endswith(COPIES)) and not any(part in path for part in lora)
    }


def lora_from_peft(
    config: Any,
    tensors: Mapping[str, mx.array],
    problems: list[str],
    head_is_a_layer: bool = False,
    num_layers: int | None = None,
    scales: Sequence[float] = (),
) -> Adapter | None:
    """A PEFT adapter's LoRA as an adapter without an encoder, or None if anything is wrong.

    ``problems`` receives everything wrong, one line each. ``head_is_a_layer``: the base is known to
    have an ``lm_head`` of its own, so that the head's LoRA goes with the others and mlx-lm loads it
    too. ``num_layers`` is the base's, None where it is not known. ``scales`` are exact ones: where
    the config gives one of them to within the last bit, it is meant.
    """
    before = len(problems)
    problems += _config_problems(config)
    if len(problems) > before:
        return None
    config = config | {name: _unwrapped_option(config.get(name)) for name in NAMED}
    pairs = _pairs(tensors, problems)
    try:
        rules = NameRules(config)
    except CheckpointError as error:
        problems.append(str(error))
        return None
    specs = {
        name: _spec(name, pair, config, rules, scales, problems) for name, pair in pairs.items()
    }
    objections = {name: rules.objection(name) for name in pairs}
    problems += [f"{name} has LoRA tensors, but {why}" for name, why in objections.items() if why]
    problems += [
        f"target_modules names {short(target)}, but no tensor belongs to it (if the base has no "
        "such module, remove it from adapter_config.json)"
        for target in rules.unused_targets(pairs)
    ]
    if len({*map(in_causal_lm, pairs)}) < len(pairs):
        problems.append("some modules are there with and without the prefix model. (keep one)")
    if len(problems) > before:
        return None
    specs, pairs = ({in_causal_lm(n): x for n, x in each.items()} for each in (specs, pairs))
    head, head_weights = None, {}
    if not head_is_a_layer and HEAD in specs:
        head, head_weights = specs.pop(HEAD), pairs.pop(HEAD)
    weights = {
        f"{name}.{part}": array for name, pair in pairs.items() for part, array in pair.items()
    }
    tuning = _lora_config(specs, config, rules, num_layers)
    return Adapter(MergeConfig(None, head_lora=head), tuning, weights, {}, head_weights)


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
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if isinstance(targets, str) and layers is not None:
        problems.append("layers_to_transform does not go with target_modules as one pattern")
    return [f"adapter_config.json: {problem}" for problem in problems]


def _pairs(tensors: Mapping[str, mx.array], problems: list[str]) -> dict[str, dict[str, mx.array]]:
    """Module path to its ``lora_a`` and ``lora_b``, transposed."""
    pairs: dict[str, dict[str, mx.array]] = {}
    seen: set[str] = set()
    for name, array in tensors.items():
        path = ADAPTER_NAME.sub(r".\1", unwrapped(name))
        reason = next((why for part, why in REFUSED_TENSORS if part in path), None)
        suffix = next((s for s in SUFFIXES if path.endswith(s)), "")
        module, shape = path.removesuffix(suffix), tuple(array.shape)
        if reason is not None:
            problems.append(f"tensor {name}: {reason}")
        elif path in seen:
            problems.append(f"tensor {name} is there under two names")
        elif path.endswith(COPIES):
            pass
        elif not suffix:
            problems.append(
                f"tensor {name} {shape} is not part of a LoRA: give `model` if it is a copy of the "
                "base's, or save without it (save_embedding_layers=False)"
            )
        elif array.ndim != 2 or 0 in shape:
            problems.append(f"tensor {name} has shape {shape}, expected (r, in) or (out, r)")
        else:
            pairs.setdefault(module, {})[SUFFIXES[suffix]] = array.T
        seen.add(path)
    if not pairs and not problems:
        problems.append(f"the adapter holds no LoRA tensors ({ZERO_3})")
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
    uniform = set(specs.values()) or {LoRASpec(config["r"], config["lora_alpha"] / config["r"])}
    if everywhere and last and len(uniform) == 1:
        # mlx-lm reads 0 layers as all of them; a module outside the layers needs none.
        return LoRAConfig(max(count, min(len(keys), 1)), dropout, *uniform, tuple(keys))
    return LoRAConfig(covered, dropout, modules=dict(specs))


class NameRules:
    """What the name options of a PEFT config say of a module; refuses bad regular expressions."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._targets, self._excluded = config["target_modules"], config.get("exclude_modules")
        self._all_linear = isinstance(self._targets, str) and self._targets.lower() == "all-linear"
        layers = config.get("layers_to_transform")
        self._layers = [layers] if isinstance(layers, int) else layers or []
        self._patterns = {
            option: [
                (_compiled(option, rf"(.*\.)?({key})$"), value)
                for key, value in (config.get(option) or {}).items()
            ]
            for option in ("rank_pattern", "alpha_pattern")
        }
        for option in ("target_modules", "exclude_modules"):
            if isinstance(config.get(option), str):
                _compiled(option, config[option])
        where = config.get("layers_pattern") or []
        named = [where] if isinstance(where, str) else where
        numbered = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in named]
        self._numbers = [
            _compiled("layers_pattern", expression)
            for expression in numbered or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        ]

    def value(self, option: str, name: str, default: Any) -> Any:
        """What ``rank_pattern`` or ``alpha_pattern`` gives a module: the first key that fits."""
        fitting = (value for key, value in self._patterns[option] if key.match(name))
        return next(fitting, (self._config.get(option) or {}).get(name, default))

    def objection(self, name: str) -> str | None:
        """Why PEFT would not apply LoRA to a module, or None."""
        if self._excluded and _names(self._excluded, name):
            return "exclude_modules names it"
        if self._all_linear:
            return "all-linear leaves the head out" if name == HEAD else None
        if not _names(self._targets, name):
            return "target_modules does not name it"
        if not self._layers or name in self._targets:
            return None
        found = next((m["idx"] for n in self._numbers if (m := n.match(name))), None) or ""
        chosen = 0 < len(found) < 10 and int(found) in self._layers
        return None if chosen else "layers_to_transform leaves it out"

    def unused_targets(self, names: Collection[str]) -> list[str]:
        """Entries of ``target_modules`` that no name ends with, and nothing may exclude."""
        if isinstance(self._targets, str) or self._excluded:
            return []
        return sorted(set(self._targets).difference(*map(name_ends, names)))

    @property
    def picks_layers(self) -> bool:
        """Whether the options may leave layers of the base out."""
        if self._excluded or self._layers:
            return True
        if isinstance(self._targets, str):
            return not self._all_linear
        return any(part.isdigit() for target in self._targets for part in target.split("."))


def _names(option: str | list[str], name: str) -> bool:
    """Whether an expression, or an entry of a list, means a module."""
    if isinstance(option, str):
        return re.fullmatch(option, name) is not None
    return not name_ends(name).isdisjoint(option)


def _compiled(option: str, expression: str) -> re.Pattern[str]:
    counts = map(int, re.findall(r"\d{1,9}(?=\}|,\d*\})", expression))
    try:
        if math.prod(max(1, count) for count in counts) > MAX_REPEATS:
            raise re.error("its repeats are too large")
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        what = f"adapter_config.json: {option}: {expression!a:.80} is not valid ({error})"
        raise CheckpointError(what) from None
