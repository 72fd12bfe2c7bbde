"""What merging is compared with: one file and one class for each method, by name."""

from __future__ import annotations

from kmerge_mlx.evaluation.baselines.base import Base
from kmerge_mlx.evaluation.baselines.mean import Mean
from kmerge_mlx.evaluation.baselines.merged import Merged
from kmerge_mlx.evaluation.baselines.method import Method
from kmerge_mlx.evaluation.baselines.selective_context import SelectiveContext
from kmerge_mlx.evaluation.baselines.spec_prefill import SpecPrefill
from kmerge_mlx.evaluation.baselines.stride import Stride
from kmerge_mlx.evaluation.baselines.truncate import Truncate
from kmerge_mlx.evaluation.baselines.uncompressed import Uncompressed

_CLASSES = (Uncompressed, Base, Merged, Mean, Truncate, Stride, SelectiveContext, SpecPrefill)

METHODS: dict[str, type[Method]] = {method.name: method for method in _CLASSES}
"""Every method, in the order in which it is shown."""

BASELINES = tuple(name for name in METHODS if name != Merged.name)
"""What merging is compared with."""
