"""Reads all tokens, with the adapter for K = 1 or, without one, with the base model."""

from __future__ import annotations

from kmerge_mlx.evaluation.baselines.method import Method


class Uncompressed(Method):
    """Reads all T tokens."""

    name = "uncompressed"
    about = "all T tokens, as --k 1"
    words = "uncompressed"
    compresses = False
