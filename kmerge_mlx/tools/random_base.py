"""Base models with random weights, made in memory in the shape of a published one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from kmerge_mlx import base
from kmerge_mlx.errors import ModelError
from kmerge_mlx.tools.machine import usable_memory
from kmerge_mlx.tools.sizing import Calculator, SizingConfig

PAD_TOKEN_ID = 0  # there is no tokenizer, and any token fills a block as well as another


@dataclass(frozen=True)
class RandomBase:
    """A base model of a known shape, without a folder and a tokenizer."""

    model: str  # what the shape is called
    config: Mapping[str, Any]
    dtype: str  # of the weights, as configs name it

    def skeleton(self) -> nn.Module:
        """mlx-lm's model, whose arrays have a shape and a dtype, and are never to be evaluated."""
        llm = base.skeleton(self.config)
        llm.set_dtype(base.DTYPES[self.dtype])
        return llm

    def make(self) -> nn.Module:
        """mlx-lm's model with the weights that it begins a training with, the same each time."""
        mx.random.seed(0)
        llm = self.skeleton()
        for _, array in tree_flatten(llm.parameters()):
            mx.eval(array)  # one by one: they are drawn in float32
        mx.clear_cache()
        llm.eval()
        return llm

    def check_memory(self, lengths: Sequence[int], ks: Iterable[int]) -> None:
        """Refuses, before a weight is made, what this machine could not hold.

        Counted are the weights, an encoder for each of ``ks``, and the KV cache of the longest
        prompt read whole.
        """
        sizes = Calculator(self.skeleton(), self.config, SizingConfig((), ()), self.model)
        whole = sizes.row(1, max(lengths), None)["memory_bytes"]
        whole += sum(sizes.factor(k)["encoder_bytes"] for k in ks)
        if whole > (usable := usable_memory()):
            raise ModelError(
                f"`shape` {self.model} in {self.dtype} takes {whole / 1e9:.1f} GB with encoders "
                f"and KV cache, and {usable / 1e9:.1f} GB of this machine's memory are usable: "
                "choose a smaller `shape`, a smaller `k` or a shorter `length`"
            )
