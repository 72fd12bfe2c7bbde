"""Gemma scales embeddings inside the model, so the paper's checkpoints for it do not convert."""

from __future__ import annotations

import json
import shutil

import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.errors import CheckpointError


def test_a_gemma_base_is_refused_by_name(tmp_path, base_path, checkpoint_path):
    base = shutil.copytree(base_path, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "gemma3_text"}))
    with pytest.raises(CheckpointError, match="scales embeddings inside the model"):
        convert_checkpoint(str(checkpoint_path), tmp_path / "out", model=str(base))
    assert not (tmp_path / "out").exists()
