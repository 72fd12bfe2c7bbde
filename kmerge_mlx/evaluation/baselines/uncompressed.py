"""Reads all tokens, with the adapter for K = 1 or, without one, with the base model."""

from __future__ import annotations

from dataclasses import dataclass

from kmerge_mlx.evaluation.baselines.base import Base
from kmerge_mlx.evaluation.baselines.method import Method


@dataclass(frozen=True)
class Uncompressed(Method):
    """Reads all T tokens."""

    name = "uncompressed"
    about = "all T tokens, as --k 1"
    words = "K=1 adapter"
    compresses = False

    alone: Base | None = None
    """What it is called without an adapter for K = 1."""

    @property
    def label(self) -> str:
        return self.words if self.alone is None else self.alone.label
