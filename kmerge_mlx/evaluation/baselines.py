"""The ways to read a prompt that `evaluate` compares: merging and its baselines, one class each.

A new baseline is one more class in ``METHODS``. All but ``uncompressed`` read ceil(T / K) positions
of T tokens that merge; what a layout keeps raw stays raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from kmerge_mlx.prompts.segments import Segment

if TYPE_CHECKING:
    import mlx.nn as nn


class Method:
    """A way to read a prompt in K times fewer positions.

    ``title`` is its label in a table, ``about`` stands in the help. If it ``merges``, it reads with
    the adapter for K, else with the one for K = 1.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str] = ""
    merges: ClassVar[bool] = False

    def __init__(self, k: int):
        self.k = k

    @property
    def label(self) -> str:
        """Its name in a table."""
        return self.title.format(k=self.k)

    @property
    def adapter_k(self) -> int:
        """The merge factor of the adapter that it reads with."""
        return self.k if self.merges else 1

    def prepare(self, model: nn.Module) -> None:
        """Changes the model that it reads with, or takes what it needs of it, before any prompt."""

    def keep(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids that are read, out of a run that would merge."""
        return ids

    def cut(self, segments: Sequence[Segment]) -> list[Segment]:
        """What the model reads of a prompt."""
        if self.merges:
            return list(segments)
        return [Segment(self.keep(s.ids) if s.merge else s.ids, False) for s in segments]


class Merged(Method):
    """The adapter for K reads blocks of K tokens."""

    name, title, merges = "merged", "K={k}", True


class Uncompressed(Method):
    """All tokens, read by the adapter for K = 1 if there is one, else by the base model."""

    name, title, about = "uncompressed", "uncompressed", "all T tokens, as --k 1"


class Mean(Method):
    """The same adapter without its encoder, so a block is the mean of its embeddings."""

    name, title, about = "mean", "mean of {k}", "of K embeddings, without the encoder"
    merges = True

    def prepare(self, model: nn.Module) -> None:
        """Takes the encoder away, for good."""
        import mlx.core as mx

        from kmerge_mlx.model import merged_embedding

        merged = merged_embedding(model)
        last = merged.encoder.w3  # a quantized one is zero where its scales and biases are
        last.update({name: mx.zeros_like(array) for name, array in last.parameters().items()})
        merged.forget_blocks()


class Truncate(Method):
    """The last ceil(T / K) tokens."""

    name, title, about = "truncate", "last 1/{k} of the tokens", "the last T/K tokens"

    def keep(self, ids: Sequence[int]) -> Sequence[int]:
        return ids[len(ids) - -(-len(ids) // self.k) :]


class Stride(Method):
    """The last token of each block."""

    name, title, about = "stride", "one token in {k}", "every K-th token"

    def keep(self, ids: Sequence[int]) -> Sequence[int]:
        return [*ids[self.k - 1 :: self.k], *(ids[-1:] if len(ids) % self.k else [])]


METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Merged, Uncompressed, Mean, Truncate, Stride)
}
BASELINES = tuple(name for name in METHODS if name != Merged.name)
