"""A way to read a prompt: what every method of `evaluate` is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kmerge_mlx.prompts.segments import Segment

if TYPE_CHECKING:
    import mlx.nn as nn

ALONE = 0
"""Stands for the base model without any adapter, where a merge factor names an adapter."""


@dataclass(frozen=True)
class Method:
    """What the model reads of a prompt; a method of its own says it in :meth:`keep`.

    What a layout keeps raw stays raw in every method. Importing them is cheap: ``--help`` shows
    their names.
    """

    name: ClassVar[str]
    about: ClassVar[str]  # what it reads, for the help
    words: ClassVar[str]  # its name in a table, with {k} for the merge factor
    compresses: ClassVar[bool] = True  # reads ceil(T / K) positions of T tokens that merge
    encodes: ClassVar[bool] = False  # reads with the adapter for K, not with that for 1

    k: int

    @property
    def label(self) -> str:
        """Its name in a table."""
        return self.words.format(k=self.k)

    @property
    def adapter_k(self) -> int:
        """The merge factor of the adapter that it reads with, or ``ALONE``."""
        return self.k if self.encodes else 1

    def prepare(self, model: nn.Module) -> None:
        """Changes the model for good, before any prompt."""

    def read(self, model: nn.Module, segments: Sequence[Segment]) -> list[Segment]:
        """What the model reads of a prompt."""
        return [Segment(self.keep(s.ids) if s.merge else s.ids, False) for s in segments]

    def keep(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids that are read, out of a run that would merge."""
        return ids

    def longest(self, model: nn.Module, segments: Sequence[Segment]) -> list[Segment]:
        """The most that the model reads at once on the way to its answer."""
        return self.read(model, segments)
