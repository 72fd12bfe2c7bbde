"""Reads the mean of each block's embeddings, with the same adapter but without its encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kmerge_mlx.evaluation.baselines.merged import Merged

if TYPE_CHECKING:
    import mlx.nn as nn


class Mean(Merged):
    """Reads blocks of K tokens whose embeddings are averaged."""

    name = "mean"
    about = "of K embeddings, without the encoder"
    words = "mean of {k}"

    def prepare(self, model: nn.Module) -> None:
        """Takes the encoder's part away: it starts from the mean, and its last layer gives zero."""
        import mlx.core as mx

        from kmerge_mlx.adapters.schema import MEAN
        from kmerge_mlx.encoder import MergeEncoder
        from kmerge_mlx.errors import PromptError
        from kmerge_mlx.model import merged_embedding

        merged = merged_embedding(model)
        if not isinstance(merged.encoder, MergeEncoder):
            raise PromptError("a window encoder reads more than the embeddings of a block")
        merged.encoder.config = replace(merged.encoder.config, start=MEAN)
        last = merged.encoder.w3  # a quantized one is zero where its scales and biases are
        last.update({name: mx.zeros_like(array) for name, array in last.parameters().items()})
        merged.forget_blocks()
