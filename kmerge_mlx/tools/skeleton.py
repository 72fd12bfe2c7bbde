"""A base model with nothing in memory: mlx-lm's own modules, as shapes and dtypes.

Owns how one is had: from weights files that are never read past their headers, or from the config
alone. MLX is lazy, so a model of any size costs no memory until something is evaluated. Does not
know what is read off it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

# mlx-lm has no public name for its table of architectures.
from mlx_lm.utils import _get_classes, load_model

from kmerge_mlx import base
from kmerge_mlx.errors import ModelError, first_line, short
from kmerge_mlx.model import widen

INDEX = "model.safetensors.index.json"


def build(path: Path, config: Mapping[str, Any], name: str, dtype: str | None = None) -> nn.Module:
    """mlx-lm's model for a config, unevaluated: it has shapes and dtypes, and no values.

    Args:
        path: The base's folder; where it lacks weights files, the config has to do.
        config: Its normalised config.
        name: What to call the base in an error.
        dtype: ``float32``, ``float16`` or ``bfloat16`` to think of it in, or None: its own.

    Returns:
        The model, in which nothing may be evaluated.

    Raises:
        ModelError: An architecture that mlx-lm lacks, or a config that does not say enough.
    """
    try:
        if has_weights(path):
            model, _ = load_model(path, lazy=True, model_config=dict(config))
            widen(model, path)
        else:
            dtype = dtype or _stated_dtype(config, name)
            model = _from_config(config, name)
    except base.LOAD_ERRORS as error:
        raise ModelError(f"cannot build {name}: {first_line(error)}") from error
    if dtype is not None:
        model.set_dtype(base.DTYPES[dtype])
    return model


def has_weights(path: Path) -> bool:
    """Whether all weights files of a base are in its folder."""
    index = path / INDEX
    if not index.is_file():
        return any(path.glob("model*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: {first_line(error)}") from None
    return all((path / str(file)).is_file() for file in names)


def _stated_dtype(config: Mapping[str, Any], name: str) -> str:
    for part in (base.text_config(config), config):
        stated = part.get("dtype") or part.get("torch_dtype")
        if stated is not None:
            if stated in base.DTYPES:
                return stated
            raise ModelError(f"config.json of {name} says dtype {short(stated)}: give --dtype")
    raise ModelError(f"config.json of {name} does not say its dtype: give --dtype")


def _from_config(config: Mapping[str, Any], name: str) -> nn.Module:
    if config.get("model_file") is not None:
        raise ModelError(f"{name} brings Python files of its own, which are not run here")
    quantization, foreign = config.get("quantization"), config.get("quantization_config")
    if quantization is None and foreign is not None:
        method = foreign.get("quant_method") if isinstance(foreign, Mapping) else foreign
        raise ModelError(
            f"{name} is quantized by {short(method)}, and its config alone does not say to which "
            "sizes: give a folder that holds its weights"
        )
    model_class, arguments = _get_classes(dict(config))
    model = model_class(arguments.from_dict(dict(config)))
    if quantization is not None:
        _quantize(model, quantization)
    model.eval()
    return model


def _quantize(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    """Quantizes what ``mlx_lm.convert`` would have: its config names only what differs."""
    group_size, own = quantization["group_size"], getattr(model, "quant_predicate", None)

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            return quantization[path]
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        return True if own is None else own(path, module)

    mode = quantization.get("mode", "affine")
    nn.quantize(model, group_size, quantization["bits"], mode=mode, class_predicate=wanted)
