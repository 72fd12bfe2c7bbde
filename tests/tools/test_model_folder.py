"""Model folders on a disk that is full or not writable: one line, and nothing left."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from kmerge_mlx.errors import ModelError
from kmerge_mlx.tools.fuse import fuse
from kmerge_mlx.tools.quantize import quantize
from tests.tools.test_fuse import made


def by_fusing(base: str, path: Path, adapter_path: Path) -> None:
    fuse(base, adapter_path, path)


@pytest.mark.parametrize(
    ("free", "said"), [(0, "No space left on device"), (1 << 40, "MLX could not write it")]
)
@pytest.mark.parametrize("make", [by_fusing, quantize])
@pytest.mark.parametrize("part", ["model.safetensors", "merge_encoder.safetensors"])
def test_a_write_that_fails_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, make, free, said, part
):
    base, adapter = made(tmp_path)
    real = mx.save_safetensors

    def save(path: str, *args: object, **options: object) -> None:
        if path.endswith(part):
            raise RuntimeError("[write] Unable to write")
        real(path, *args, **options)

    monkeypatch.setattr(mx, "save_safetensors", save)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(ModelError, match=f"^cannot write .*new: .*{said}") as error:
        make(str(base), tmp_path / "new", adapter_path=adapter)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
