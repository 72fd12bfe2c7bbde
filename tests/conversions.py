"""Conversions of hand-made checkpoints: into a folder, or refused; and the base they fit.

A test module takes the fixture by assignment, ``tied = conversions.tied``: pytest finds it there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.errors import CheckpointError
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
    source = (
        checkpoint.write(tmp_path / "src") if isinstance(checkpoint, Checkpoint) else checkpoint
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as caught:
        convert_checkpoint(str(source), tmp_path / "dst", **options)
    assert sorted(tmp_path.rglob("*")) == before
    text = str(caught.value)
    assert text.splitlines()[0].isprintable()
    return text
