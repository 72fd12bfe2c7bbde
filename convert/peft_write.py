"""Writes a LoRA as a PEFT adapter: the reverse of ``peft.py``, whose names it uses.

To PEFT, ``lora_alpha / r`` is the scale, and an entry of ``target_modules`` or of a pattern means
every module whose path ends with it: a short entry is written only where that is what is meant.

Source: LoraConfig of PEFT 0.21, and as for ``patterns.py``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from typing import Any

import mlx.core as mx

from kmerge_mlx.adapters.folder import HEAD, Adapter, name_ends
from kmerge_mlx.adapters.schema import LoRAConfig, LoRASpec
from kmerge_mlx.convert.peft import PREFIX, SUFFIXES, neighbours, place

_MOST_EXACT = 2**53  # integers up to this are float64s as well


def lora_to_peft(
    adapter: Adapter, base_model: str | None
) -> tuple[dict[str, Any], dict[str, mx.array], list[float]]:
    """Says an adapter's LoRA in PEFT's terms.

    Args:
        adapter: Its LoRA, the output head's included, which PEFT finds as ``lm_head``.
        base_model: What PEFT is to call the base: a folder, a repo id, or None.

    Returns:
        The content of ``adapter_config.json``, that of ``adapter_model.safetensors``, and the
        scales that no ``lora_alpha`` gives to the last bit, ascending.
    """
    tuning, weights = adapter.tuning, dict(adapter.tuning_weights)
    modules = {name.rpartition(".")[0] for name in weights}
    specs = {name: tuning.uniform or tuning.modules[name] for name in sorted(modules)}
    if adapter.merge.head_lora is not None:
        specs[HEAD] = adapter.merge.head_lora
        weights |= {f"{HEAD}.{part}": array for part, array in adapter.head_weights.items()}
    suffixes = {part: suffix for suffix, part in SUFFIXES.items()}
    tensors = {}
    for name, array in weights.items():
        module, _, part = name.rpartition(".")
        tensors[f"{PREFIX}{module}{suffixes[part]}"] = array.T
    ranks = {name: spec.rank for name, spec in specs.items()}
    alphas = {name: _alpha(spec) for name, spec in specs.items()}
    rank, alpha = _most_common(ranks, 1), _most_common(alphas, 1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": tuning.dropout,
        "use_rslora": False,
        "bias": "none",
        "target_modules": _targets(specs, tuning, adapter.merge.base.fields),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "modules_to_save": None,
    }
    inexact = {s.scale for name, s in specs.items() if alphas[name] / s.rank != s.scale}
    return config, tensors, sorted(inexact)


def _alpha(spec: LoRASpec) -> float:
    """The ``lora_alpha`` that, divided by the rank, is the scale; an integer where it is one.

    About one scale in six has none, at ranks that are not a power of two: the nearest then.
    """
    alpha = float(spec.scale) * spec.rank
    alpha = next((a for a in neighbours(alpha) if a / spec.rank == spec.scale), alpha)
    return int(alpha) if alpha.is_integer() and abs(alpha) < _MOST_EXACT else alpha


def _most_common(values: Mapping[str, Any], default: Any) -> Any:
    counted = Counter(values.values()).most_common(1)
    return counted[0][0] if counted else default


def _pattern(values: Mapping[str, Hashable], default: Hashable) -> dict[str, Any]:
    """The modules that have another value, each by a regular expression that means no other one."""
    ending = defaultdict(set)  # the end of a path -> the values of all modules that have it
    for name, value in values.items():
        for end in name_ends(name):
            ending[end].add(value)
    keys = {}
    for name, value in values.items():
        inside = place(name)[2]
        short = next((end for end in (inside, name) if len(ending[end]) == 1), None)
        if value != default:
            keys[f"^{re.escape(name)}" if short is None else re.escape(short)] = value
    return dict(sorted(keys.items()))


def _targets(
    specs: Mapping[str, LoRASpec], tuning: LoRAConfig, fields: Mapping[str, Any]
) -> list[str]:
    """The modules by their paths inside a layer where all layers are meant, else by full paths."""
    layers: dict[str, set[int | None]] = defaultdict(set)
    for name in specs:
        _, layer, inside = place(name)
        layers[inside].add(layer)
    named = set(tuning.keys) & layers.keys()  # keys may be full paths too
    covered = set().union(*(layers[inside] for inside in named))
    count = fields.get("num_hidden_layers")
    # The last of the layers, as mlx-lm counts them: with the first among them, they are all.
    all_covered = tuning.num_layers in (0, count) or 0 in covered
    short = {
        inside
        for inside, found in layers.items()
        if (all_covered and inside in named)
        or (len(found) == count and found == set(range(len(found))))
    }
    return sorted({inside if (inside := place(name)[2]) in short else name for name in specs})
