"""Merge encoders for several K in one model: a block is read by the encoder of its own K."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from kmerge_mlx.adapters.schema import EncoderConfig
from kmerge_mlx.encoder import MergeEncoder
from kmerge_mlx.errors import AdapterError, short


class MultiEncoder(nn.Module):
    """One merge encoder for each of several K, all of one width D and one context c.

    Its ``config`` is that of the smallest K.

    Args:
        encoders: At least one, by K.

    Raises:
        AdapterError: They are not all of one width.
    """

    def __init__(self, encoders: Mapping[int, MergeEncoder]):
        super().__init__()
        if len(widths := {e.config.hidden_size for e in encoders.values()}) > 1:
            raise AdapterError(f"merge encoders have hidden_size {short(widths)}, expected one")
        self.ks = tuple(sorted(encoders))
        self.table_rows = None
        for k in self.ks:
            self[f"k{k}"] = encoders[k]

    @property
    def config(self) -> EncoderConfig:
        """Sizes of the encoder for the smallest K."""
        return self[f"k{self.ks[0]}"].config

    @property
    def num_parameters(self) -> int:
        """How many numbers all of them hold."""
        return sum(self[f"k{k}"].num_parameters for k in self.ks)

    @property
    def dtype(self) -> mx.Dtype:
        """Of merged embeddings."""
        return self[f"k{self.ks[0]}"].dtype

    def of(self, k: int) -> MergeEncoder | None:
        """The encoder for a K, or None: K = 1 has none."""
        return self.get(f"k{k}")

    def __call__(self, embeddings: mx.array) -> mx.array:
        """Merges blocks of one K, ``(N, c + K, D)``, to ``(N, D)``, as ``MergeEncoder`` does."""
        return self[f"k{embeddings.shape[1] - self.config.context}"](embeddings)
