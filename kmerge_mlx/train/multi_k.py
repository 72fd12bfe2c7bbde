"""Training for several K at once: which K a batch has, and what its gradients are of."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

_OWNER = re.compile(r"\.(?:encoder|decoder)\.k(\d+)\.")


def drawn(ks: Sequence[int], seed: int, iteration: int) -> int:
    """The K of an iteration's batch (from 1), which follows from the seed and the iteration alone.

    Each K comes once in every ``len(ks)`` batches, in an order that is drawn anew.
    """
    if len(ks) == 1:
        return ks[0]
    turn, at = divmod(iteration - 1, len(ks))
    # RandomState's sequences are frozen; numpy may change those of its newer generators.
    return ks[np.random.RandomState([seed % 2**32, turn % 2**32]).permutation(len(ks))[at]]


def owned(tree: Any, ks: Collection[int]) -> Any:
    """A tree of weights without those that belong to other K than ``ks``.

    What a batch did not read has no gradient: a zero would let AdamW's momentum move it all the
    same, and would take the memory and the time of an encoder.
    """
    flat = tree_flatten(tree)
    kept = [(n, a) for n, a in flat if not (of := _OWNER.search(n)) or int(of[1]) in ks]
    return tree if len(kept) == len(flat) else tree_unflatten(kept)


def added(one: Any, two: Any) -> Any:
    """The sum of two trees of arrays, of which each may lack what the other has."""
    flat, more = dict(tree_flatten(one)), dict(tree_flatten(two))
    if flat.keys() == more.keys():
        return tree_map(mx.add, one, two)
    both = {n: flat[n] + more[n] for n in flat.keys() & more.keys()}
    # By name: the norm of all gradients is a sum in this order.
    return tree_unflatten(sorted((flat | more | both).items()))
