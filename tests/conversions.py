"""Checkpoints converted, adapters exported, and how two adapters are compared: for their tests.

A test module takes the fixture by assignment, ``tied = conversions.tied``: pytest finds it there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.adapters.folder import Adapter, load_adapter, save_adapter
from kmerge_mlx.adapters.schema import LoRAConfig
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter
from kmerge_mlx.errors import CheckpointError, KMergeError
from tests.checkpoints import Checkpoint
from tests.tiny import qwen2_config, write_base


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("tied"), qwen2_config())


def convert(tmp_path: Path, checkpoint: Checkpoint, bin_file: bool = False, **options) -> Path:
    source = checkpoint.write(tmp_path / "src", bin_file)
    convert_checkpoint(str(source), tmp_path / "dst", **options)
    return tmp_path / "dst"


def refused(tmp_path: Path, checkpoint: Checkpoint | Path, kind=CheckpointError, **options) -> str:
    """The message of a conversion that must fail, and leave nothing."""
    if isinstance(checkpoint, Checkpoint):
        checkpoint = checkpoint.write(tmp_path / "src")
    return _refused(convert_checkpoint, str(checkpoint), tmp_path / "dst", kind, options)


def export_refused(source: Path, destination: Path, **options) -> str:
    """The message of an export that must fail, and leave nothing."""
    return _refused(export_adapter, source, destination, KMergeError, options)


def _refused(
    write: Callable, source: str | Path, path: Path, kind: type[KMergeError], options: dict
) -> str:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        write(source, path, **options)
    assert sorted(path.parent.rglob("*")) == before
    text = str(caught.value)
    assert text.splitlines()[0].isprintable()
    return text


def exported(adapter: Adapter, folder: Path) -> Path:
    """Saves an adapter, and exports it."""
    save_adapter(adapter, folder / "x")
    export_adapter(folder / "x", folder / "y")
    return folder / "y"


def back(folder: Path, **options: str) -> Adapter:
    """Converts ``folder/y``."""
    convert_checkpoint(str(folder / "y"), folder / "back", **options)
    return load_adapter(folder / "back")


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
    for part in ("tuning_weights", "encoder_weights", "head_weights"):
        assert bits(getattr(one, part)) == bits(getattr(two, part))


def specs(adapter: Adapter) -> dict[str, tuple[int, float]]:
    """Rank and exact scale of every module, whichever form the config has."""
    tuning = adapter.tuning
    assert isinstance(tuning, LoRAConfig)
    modules = {name.rsplit(".", 1)[0] for name in adapter.tuning_weights}
    found = {name: tuning.uniform or tuning.modules[name] for name in modules}
    if adapter.merge.head_lora is not None:
        found["lm_head"] = adapter.merge.head_lora
    return {name: (spec.rank, spec.scale) for name, spec in found.items()}
