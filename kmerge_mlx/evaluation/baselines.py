"""The ways to read a prompt that are compared, and the models that they need.

Owns: merging and its baselines, each as a change of a prompt's segments or of the encoder. Does not
know questions or scores.

Every baseline has the budget of merging, ceil(T / K) positions for T tokens, or none at all:
``uncompressed`` is the adapter for K = 1 if there is one, else the base model; ``truncate`` and
``stride`` let the same model read the last tokens, or every K-th; ``mean`` leaves the adapter as it
is but for its encoder, which gives the mean of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from kmerge_mlx.adapters.folder import find_adapters, read_merge_config
from kmerge_mlx.adapters.schema import MergeConfig
from kmerge_mlx.adapters.tuning import LoRAConfig
from kmerge_mlx.errors import AdapterError, EvaluateError
from kmerge_mlx.evaluation.settings import (
    MEAN,
    MERGED,
    STRIDE,
    TRUNCATE,
    UNCOMPRESSED,
    EvaluateConfig,
)
from kmerge_mlx.model import load, merged_embedding, wire
from kmerge_mlx.prompts.policy import Layout, chosen
from kmerge_mlx.prompts.segments import Segment


@dataclass(frozen=True)
class Method:
    """A way to read a prompt.

    Args:
        name: ``merged``, or one of the baselines.
        k: Merge factor, or how many times fewer positions; 1 for ``uncompressed``.
    """

    name: str
    k: int

    @property
    def label(self) -> str:
        """What to call it in a table."""
        return {
            MERGED: f"K={self.k}",
            UNCOMPRESSED: "uncompressed",
            MEAN: f"mean of {self.k}",
            TRUNCATE: f"last 1/{self.k} of the tokens",
            STRIDE: f"one token in {self.k}",
        }[self.name]

    @property
    def adapter_k(self) -> int:
        """Which adapter it reads with."""
        return self.k if self.name in (MERGED, MEAN) else 1

    def cut(self, segments: Sequence[Segment]) -> list[Segment]:
        """What of a prompt is given to the model."""
        k = self.k
        if self.name not in (TRUNCATE, STRIDE):
            return list(segments)
        cut = []
        for segment in segments:
            ids, keep = segment.ids, -(-len(segment.ids) // k)
            if segment.merge:
                # A block's last token; the last block may be shorter.
                strided = [*ids[k - 1 :: k], *(ids[-1:] if len(ids) % k else [])]
                ids = ids[-keep:] if self.name == TRUNCATE else strided
            cut.append(Segment(ids, False))
        return cut


def adapters(config: EvaluateConfig) -> dict[int, Path]:
    """The adapters that there are, by merge factor.

    Raises:
        AdapterError: A folder that holds none.
    """
    return {} if config.adapter_path is None else find_adapters(config.adapter_path)


def wanted(config: EvaluateConfig) -> list[Method]:
    """The methods that a config asks for, in the order in which they are shown.

    Raises:
        AdapterError: An adapter that is not there (lists those that are).
        EvaluateError: A baseline of merging, and nothing is merged.
    """
    have = adapters(config)
    ks = sorted({*(config.ks or have or (1,))})
    for k in ks:
        if k != 1 and k not in have:
            listed = ", ".join(map(str, have))
            raise AdapterError(
                f"{config.adapter_path} holds no adapter for --k {k}: it has K = {listed}"
            )
    others = [name for name in (MEAN, TRUNCATE, STRIDE) if name in config.baselines]
    if others and ks == [1]:
        raise EvaluateError(f"--baseline {others[0]} has the budget of merging: give --k above 1")
    methods = []
    if 1 in ks or UNCOMPRESSED in config.baselines:
        methods.append(Method(UNCOMPRESSED, 1))
    for k in [k for k in ks if k > 1]:
        # The mean comes after merging: it takes the encoder away.
        methods += [Method(name, k) for name in (MERGED, *others)]
    return methods


def layout_of(config: EvaluateConfig, methods: Sequence[Method]) -> Layout:
    """How prompts are laid out: alike for all that is compared, as the adapters were trained.

    Raises:
        EvaluateError: They were trained differently, and the config does not say what to do.
    """
    folders = adapters(config)
    ks = {method.adapter_k for method in methods} & set(folders)
    stored = {read_merge_config(folders[k]).layout for k in sorted(ks)} or {None}
    asked = (config.merges, config.merge_threshold, config.chat_template)
    found = {chosen(layout, *asked) for layout in stored}
    if len(found) > 1:
        raise EvaluateError(
            f"the adapters for K = {', '.join(map(str, sorted(ks)))} were trained on prompts laid "
            "out differently: measure one --k at a time, or give --merges, --merge-threshold and "
            "--apply-chat-template or --ignore-chat-template"
        )
    return found.pop()


def reader(config: EvaluateConfig, k: int) -> tuple[nn.Module, Any]:
    """Loads the model that methods read with.

    Args:
        config: Which base and which adapters.
        k: Its ``Method.adapter_k``. Without an adapter for 1, that is the base alone.

    Returns:
        The model, its embedding wrapped, and its tokenizer.

    Raises:
        ModelError: The base cannot be loaded.
        AdapterError: An adapter that is torn or does not fit.
    """
    trust = config.trust_remote_code
    if k in adapters(config):
        return load(config.model, config.adapter_path, k, trust_remote_code=trust)
    model, tokenizer = load(config.model, trust_remote_code=trust)
    wire(model, MergeConfig(None), LoRAConfig(0), 0, config.model)
    model.eval()
    return model, tokenizer


def take_encoder_away(model: nn.Module) -> None:
    """Makes a model's encoder give the mean of a block, from now on."""
    merged = merged_embedding(model)
    last = merged.encoder.w3  # a quantized one is zero where its scales and biases are
    last.update({name: mx.zeros_like(array) for name, array in last.parameters().items()})
    merged.forget_blocks()
