"""Merge encoders for several K in one model: a block is read by the encoder of its own K."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from kmerge_mlx.adapters.schema import EncoderConfig
from kmerge_mlx.encoder import Block, MergeEncoder, Run
from kmerge_mlx.errors import AdapterError, short

Key = tuple[int, Block]
"""A K, and what its encoder reads of a block."""


class MultiEncoder(nn.Module):
    """One merge encoder for each of several K, all of one width D.

    What it does not name a K for is of the smallest, whose ``config`` is its own.

    Args:
        encoders: At least one, by K.

    Raises:
        AdapterError: They are not all of one width.
    """

    def __init__(self, encoders: Mapping[int, MergeEncoder]):
        super().__init__()
        if len(widths := {e.config.hidden_size for e in encoders.values()}) > 1:
            raise AdapterError(f"merge encoders have hidden_size {short(widths)}, expected one")
        self.table_rows = None
        for k, encoder in sorted(encoders.items()):
            self[f"k{k}"] = encoder

    @property
    def ks(self) -> tuple[int, ...]:
        """The Ks that there are encoders for, ascending."""
        return tuple(int(name[1:]) for name in self)

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

    @classmethod
    def make(
        cls,
        configs: Mapping[int, EncoderConfig | None],
        weights: Mapping[int, Mapping[str, mx.array]],
    ) -> MultiEncoder:
        """Fresh encoders of these sizes by K (None for K = 1), those with weights having these."""
        made = {k: MergeEncoder(config) for k, config in configs.items() if config is not None}
        for k in made.keys() & weights.keys():
            made[k].load_weights(list(weights[k].items()))
        return cls(made)

    def keys(self, ids: Sequence[int], pad_token_id: int, k: int | None = None) -> list[Key]:
        """The blocks of a run for one K, each with that K: two encoders may read the same ids."""
        k = self.ks[0] if k is None else k
        return [(k, block) for block in self[f"k{k}"].keys(ids, pad_token_id)]

    def merge(
        self, table: nn.Module, runs: Iterable[Run], wanted: Collection[Key]
    ) -> Iterator[tuple[list[Key], mx.array]]:
        """The merged embeddings of blocks, a bounded number at once; see ``Encoder``."""
        for k in self.ks:
            blocks = [block for of, block in wanted if of == k]
            for part, merged in self[f"k{k}"].merge(table, (), blocks):
                yield [(k, block) for block in part], merged

    def __call__(self, embeddings: mx.array) -> mx.array:
        """Merges blocks of one K, ``(N, c + K, D)``, to ``(N, D)``, as ``MergeEncoder`` does.

        The context c has to be that of all of them.
        """
        return self[f"k{embeddings.shape[1] - self.config.context}"](embeddings)
