"""Full fine-tuning: the last layers' own weights in place of the base's.

Owns which parameters of a model those are. Does not know training or files.

Source: mlx-lm's ``fine_tune_type: full``, which unfreezes the last ``num_layers`` layers whole:
not the embedding table, the last norm or the output head.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from kmerge_mlx.adapters.lora import last_layers
from kmerge_mlx.adapters.tuning import FullConfig
from kmerge_mlx.errors import AdapterError


def parameters(model: nn.Module, config: FullConfig) -> dict[str, mx.array]:
    """The parameters of the layers that ``config`` covers, by their names in the model."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {
        f"{paths[id(layer)]}.{name}": array
        for layer in last_layers(model, config.num_layers)
        for name, array in tree_flatten(layer.parameters())
    }


def check(model: nn.Module, config: FullConfig, name: str) -> None:
    """Refuses a model whose layers cannot be fine-tuned whole.

    Args:
        model: An mlx-lm model.
        config: Which layers.
        name: What to call the model in an error.

    Raises:
        AdapterError: Fewer layers than are covered, or quantized ones.
    """
    if config.num_layers > len(model.layers):
        raise AdapterError(
            f"{name} has {len(model.layers)} layers, full fine-tuning covers {config.num_layers}"
        )
    for parameter, array in parameters(model, config).items():
        if not mx.issubdtype(array.dtype, mx.floating):
            raise AdapterError(
                f"full fine-tuning changes {parameter}, which is quantized in {name}: use LoRA, "
                "or a base that is not quantized"
            )
