"""Where a checkpoint is found, and what its adapter replaces."""

from __future__ import annotations

import os

import numpy as np

from kmerge_mlx.adapters.folder import FILES, load_adapter
from kmerge_mlx.convert.checkpoint import convert_checkpoint, find_checkpoint
from kmerge_mlx.errors import AdapterError
from tests import conversions
from tests.checkpoints import make
from tests.conversions import convert, refused

tied = conversions.tied


# ---- finding it ----


def test_the_best_or_last_sub_folder_is_found_where_the_folder_is_no_checkpoint(tmp_path):
    for i, (folders, found) in enumerate(
        (
            (("best",), "best"),
            (("last", "best", "step_best", "step_last"), "best"),
            (("last", "step_best", "step_last"), "step_best"),
            (("step_last", "last"), "last"),
            (("step_last", "other"), "step_last"),
            (("small_stage",), "small_stage"),
            (("", "best"), ""),
        )
    ):
        root = tmp_path / str(i)
        for name in folders:
            make().write(root / name)
        (root / "logs").mkdir()
        assert find_checkpoint(str(root)) == root / found
    for name in ("stage_b", "stage_a"):
        make().write(tmp_path / "several" / name)
    text = refused(tmp_path, tmp_path / "several")
    assert text.endswith("holds several checkpoints (stage_a, stage_b): name one of them")


def test_what_is_no_checkpoint_is_one_line(tmp_path, tied):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    (tmp_path / "empty").mkdir()
    for name in ("encoder.pth", "adapter_config.json", "adapter_model.safetensors"):
        (make().write(tmp_path / name) / name).unlink()
    adapter = convert(tmp_path, make())
    for source, why in (
        *((tmp_path / name, name) for name in ("encoder.pth", "adapter_config.json")),
        (tmp_path / "adapter_model.safetensors", "neither adapter_model.safetensors nor"),
        (tmp_path / "empty", "holds no encoder.pth and no adapter_config.json"),
        (tied, "holds no encoder.pth and no adapter_config.json"),
        (tied / "config.json", "is a file: give the folder that holds encoder.pth"),
        (adapter, "is an adapter folder already"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("nobody/nothing", "nobody/nothing"),
        ("", ""),
    ):
        text = refused(tmp_path, source, force=True)
        assert why in text
        assert "\n" not in text


# ---- the destination ----


def test_an_adapter_is_replaced_only_by_force_and_by_a_whole_one(tmp_path):
    path = convert(tmp_path, make())
    before = {name: (path / name).read_bytes() for name in FILES}
    made = make(k=2)
    source = made.write(tmp_path / "other")
    text = refused(tmp_path, source, AdapterError)
    assert "exists: choose another folder, or give `force`" in text
    made.encoder["net.0.bias"][0] = np.nan
    assert "diverged" in refused(tmp_path, made.write(tmp_path / "broken"), force=True)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    convert_checkpoint(str(source), path, force=True)
    assert load_adapter(path).merge.encoder.merge_factor == 2
