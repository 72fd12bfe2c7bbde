"""Adapters exported and read back, and how two adapters are compared: shared by its tests."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.adapters.folder import Adapter, load_adapter, save_adapter
from kmerge_mlx.adapters.schema import LoRAConfig
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter
from kmerge_mlx.errors import KMergeError


def bits(tensors: dict[str, mx.array]) -> dict[str, tuple]:
    """Name -> dtype, shape and bytes."""
    found = {}
    for name, array in tensors.items():
        same_width = mx.uint32 if array.dtype.size == 4 else mx.uint16
        whole = mx.contiguous(array).view(same_width)
        found[name] = (array.dtype, array.shape, np.array(whole).tobytes())
    return found


def assert_same_tensors(one: Adapter, two: Adapter) -> None:
    """Every tensor of two adapters is in the same part, and the same to the bit."""
    assert bits(one.tuning_weights) == bits(two.tuning_weights)
    assert bits(one.encoder_weights) == bits(two.encoder_weights)
    assert bits(one.head_weights) == bits(two.head_weights)


def specs(adapter: Adapter) -> dict[str, tuple[int, float]]:
    """Rank and exact scale of every module, whichever form the config has."""
    tuning = adapter.tuning
    assert isinstance(tuning, LoRAConfig)
    modules = {name.rsplit(".", 1)[0] for name in adapter.tuning_weights}
    found = {name: tuning.uniform or tuning.modules[name] for name in modules}
    if adapter.merge.head_lora is not None:
        found["lm_head"] = adapter.merge.head_lora
    return {name: (spec.rank, spec.scale) for name, spec in found.items()}


def exported(adapter: Adapter, folder: Path) -> Path:
    """Saves an adapter, and exports it."""
    save_adapter(adapter, folder / "x")
    export_adapter(folder / "x", folder / "y")
    return folder / "y"


def back(folder: Path, **options: str) -> Adapter:
    """Converts ``folder/y``."""
    convert_checkpoint(str(folder / "y"), folder / "back", **options)
    return load_adapter(folder / "back")


def refused(source: Path, destination: Path, **options: object) -> str:
    """The message of an export that must fail, and leave nothing."""
    before = sorted(destination.parent.rglob("*"))
    with pytest.raises(KMergeError) as caught:
        export_adapter(source, destination, **options)
    assert sorted(destination.parent.rglob("*")) == before
    text = str(caught.value)
    assert text.splitlines()[0].isprintable()
    return text
