"""Reads all tokens with the base model alone, as its folder holds it."""

from __future__ import annotations

from dataclasses import dataclass

from kmerge_mlx.evaluation.baselines.method import ALONE, Method


@dataclass(frozen=True)
class Base(Method):
    """Reads all T tokens without any adapter, even if there is one for K = 1."""

    name = "base"
    about = "all T tokens, without any adapter"
    words = "base without adapter"
    compresses = False

    trained: bool = False
    """Whether all that was trained but the encoder is in the base's own weights: LCLM, ``fuse``."""

    @property
    def label(self) -> str:
        return "model alone" if self.trained else self.words

    @property
    def adapter_k(self) -> int:
        return ALONE
