"""What methods share that read a prompt once, weigh its tokens, and answer from the heaviest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from kmerge_mlx.evaluation.baselines.method import Method
from kmerge_mlx.prompts.segments import Segment

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

STEP = 512
"""Tokens that a scoring pass reads at once: in float32 their logits are 311 MB at V = 151,936."""


class Weighing(Method, ABC):
    """Keeps the ceil(T / K) tokens of each merging run that weigh most, in their order.

    The pass that weighs them reads the whole prompt with the model that answers. The tokens that
    stay are read again, at their new places.
    """

    chunk: ClassVar[int] = 1  # tokens of a run that stay or go together, by their mean weight

    @abstractmethod
    def weigh(self, model: nn.Module, ids: mx.array) -> mx.array:
        """The weight of every token of a prompt: float32 ``(T,)`` for ids ``(T,)``."""

    def read(self, model: nn.Module, segments: Sequence[Segment]) -> list[Segment]:
        import mlx.core as mx
        import numpy as np

        if not any(segment.merge for segment in segments):
            return self.longest(model, segments)
        ids = [i for segment in segments for i in segment.ids]
        weights = np.array(self.weigh(model, mx.array(ids)))
        read, start = [], 0
        for segment in segments:
            kept, end = segment.ids, start + len(segment.ids)
            if segment.merge:
                own = self._together(weights[start:end])
                heaviest = np.argsort(-own, kind="stable")[: -(-len(own) // self.k)]
                kept = [segment.ids[i] for i in np.sort(heaviest)]
            read.append(Segment(kept, False))
            start = end
        return read

    def _together(self, weights: Any) -> Any:
        """Gives each token of a run the mean weight of its chunk."""
        import numpy as np

        starts = np.arange(0, len(weights), self.chunk)
        sizes = np.diff([*starts, len(weights)])
        return np.repeat(np.add.reduceat(weights, starts) / sizes, sizes)

    def longest(self, model: nn.Module, segments: Sequence[Segment]) -> list[Segment]:
        return [Segment(segment.ids, False) for segment in segments]


def in_steps(model: nn.Module, ids: mx.array, cache: Sequence[Any]) -> Iterator[mx.array]:
    """Reads a prompt into a KV cache, and gives the logits ``(n, V)`` of each step."""
    import mlx.core as mx

    for start in range(0, ids.size, STEP):
        yield model(ids[None, start : start + STEP], cache=cache)[0]
        mx.eval([layer.state for layer in cache])
