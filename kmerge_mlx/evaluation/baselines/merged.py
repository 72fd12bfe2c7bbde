"""Reads merged blocks: what the baselines are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kmerge_mlx.evaluation.baselines.method import Method
from kmerge_mlx.prompts.segments import Segment

if TYPE_CHECKING:
    import mlx.nn as nn


class Merged(Method):
    """Reads blocks of K tokens, merged by the adapter's encoder."""

    name = "merged"
    about = "blocks of K tokens, merged"
    words = "K={k}"
    encodes = True

    def read(self, model: nn.Module, segments: Sequence[Segment]) -> list[Segment]:
        return list(segments)  # they merge where the model reads them
