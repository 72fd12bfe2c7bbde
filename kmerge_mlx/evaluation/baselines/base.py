"""Reads all tokens with the base model alone, as it was before any training here."""

from __future__ import annotations

from kmerge_mlx.evaluation.baselines.method import ALONE, Method


class Base(Method):
    """Reads all T tokens without any adapter, even if there is one for K = 1."""

    name = "base"
    about = "all T tokens, without any adapter"
    words = "untrained base"
    compresses = False

    @property
    def adapter_k(self) -> int:
        return ALONE
