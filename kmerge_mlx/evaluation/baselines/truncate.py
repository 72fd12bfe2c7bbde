"""Reads the end of the text: what a length limit does."""

from __future__ import annotations

from collections.abc import Sequence

from kmerge_mlx.evaluation.baselines.method import Method


class Truncate(Method):
    """Reads the last ceil(T / K) tokens."""

    name = "truncate"
    about = "the last T/K tokens"
    words = "last 1/{k} of the tokens"

    def keep(self, ids: Sequence[int]) -> Sequence[int]:
        return ids[len(ids) - -(-len(ids) // self.k) :]
