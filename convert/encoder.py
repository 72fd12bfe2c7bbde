"""Converts the tensors of ``encoder.pth`` to merge encoder weights, and back.

Source: the authors' state dict, ``net.{0,2,4}`` of an ``nn.Sequential`` (arXiv 2604.15153, released
code); under DistributedDataParallel every name has the prefix ``module.``.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from kmerge_mlx.adapters.lora import tensor_problems
from kmerge_mlx.adapters.schema import EncoderConfig
from kmerge_mlx.errors import AdapterError

# (PyTorch name, our name); both libraries keep a linear layer's weight as (out, in).
NAMES = (
    ("net.0.weight", "w1.weight"),
    ("net.0.bias", "w1.bias"),
    ("net.2.weight", "w2.weight"),
    ("net.2.bias", "w2.bias"),
    ("net.4.weight", "w3.weight"),
    ("net.4.bias", "w3.bias"),
)


def encoder_from_torch(
    state: Mapping[str, mx.array], k: int | None, problems: list[str]
) -> tuple[EncoderConfig, dict[str, mx.array]] | None:
    """Converts an encoder's state dict.

    Args:
        state: PyTorch names to tensors.
        k: The merge factor the user expects, or None to take what the shapes say.
        problems: Receives everything wrong, one line each.

    Returns:
        Sizes and renamed tensors, or None if the shapes give no K, D and H.
    """
    plain = {name.removeprefix("module."): array for name, array in state.items()}
    if len(plain) < len(state):
        problems.append(
            "encoder.pth: some tensors are there with and without the prefix module. (keep one)"
        )
    try:
        sizes = _sizes(plain)
    except AdapterError as error:
        problems.append(f"encoder.pth: {error}")
        return None
    if k not in (None, sizes.merge_factor):
        problems.append(
            f"encoder.pth merges K = {sizes.merge_factor} tokens, but `k` is {k}: "
            f"give {sizes.merge_factor} or leave it out"
        )
    expected = {theirs: sizes.shapes()[ours] for theirs, ours in NAMES}
    found = {name: tuple(array.shape) for name, array in plain.items()}
    problems += [f"encoder.pth: {p}" for p in tensor_problems(expected, found)]
    return sizes, {ours: plain[theirs] for theirs, ours in NAMES if theirs in plain}


def encoder_to_torch(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The state dict of ``encoder.pth``: PyTorch names to an encoder's weights."""
    return {theirs: weights[ours] for theirs, ours in NAMES}


def _sizes(state: Mapping[str, mx.array]) -> EncoderConfig:
    first, last = state.get("net.0.weight"), state.get("net.4.weight")
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        names = ", ".join(sorted(state)[:8]) or "nothing"
        raise AdapterError(
            f"not a merge encoder: found {names}, expected 2-dimensional net.0.weight and "
            "net.4.weight"
        )
    (inner, wide), hidden = first.shape, last.shape[0]
    if hidden == 0 or wide % hidden or wide // hidden < 2:
        raise AdapterError(
            f"net.0.weight {tuple(first.shape)} and net.4.weight {tuple(last.shape)} give no "
            "whole merge factor of at least 2"
        )
    return EncoderConfig(wide // hidden, hidden, inner)
