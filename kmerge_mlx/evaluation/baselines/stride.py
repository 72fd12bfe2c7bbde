"""Reads tokens at equal distances."""

from __future__ import annotations

from collections.abc import Sequence

from kmerge_mlx.evaluation.baselines.method import Method


class Stride(Method):
    """Reads every K-th token: the last one of each block."""

    name = "stride"
    about = "every K-th token"
    words = "one token in {k}"

    def keep(self, ids: Sequence[int]) -> Sequence[int]:
        return [*ids[self.k - 1 :: self.k], *(ids[-1:] if len(ids) % self.k else [])]
