"""Where a checkpoint is found, and where its adapter may be written; nothing else is replaced."""

from __future__ import annotations

import os

import numpy as np
import pytest

from kmerge_mlx.adapters.folder import FILES, load_adapter
from kmerge_mlx.convert.checkpoint import convert_checkpoint, find_checkpoint
from kmerge_mlx.errors import AdapterError, CheckpointError
from tests import conversions
from tests.checkpoints import make
from tests.conversions import convert, refused

tied = conversions.tied


# ---- finding it ----


def test_a_flat_folder_is_the_checkpoint_whatever_lies_below(tmp_path):
    source = make().write(tmp_path)
    make(k=2).write(tmp_path / "best")
    assert find_checkpoint(str(source)) == tmp_path


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("best",), "best"),
        (("last", "best", "step_best", "step_last"), "best"),
        (("last", "step_best", "step_last"), "step_best"),
        (("step_last", "last"), "last"),
        (("step_last", "other"), "step_last"),
        (("small_stage",), "small_stage"),
    ],
)
def test_the_best_or_last_sub_folder_is_found(tmp_path, folders, found):
    for i, name in enumerate(folders):
        make(k=2 + i).write(tmp_path / name)
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert find_checkpoint(str(tmp_path)) == tmp_path / found


def test_several_other_sub_folders_are_listed(tmp_path):
    for name in ("stage_b", "stage_a"):
        make().write(tmp_path / name)
    text = refused(tmp_path, tmp_path)
    assert text.endswith("holds several checkpoints (stage_a, stage_b): name one of them")


@pytest.mark.parametrize(
    "missing", ["encoder.pth", "adapter_config.json", "adapter_model.safetensors"]
)
def test_a_missing_part_is_named(tmp_path, missing):
    source = make().write(tmp_path / "src")
    (source / missing).unlink()
    text = refused(tmp_path, source)
    assert missing in text
    assert "\n" not in text


def test_what_is_no_checkpoint_is_one_line(tmp_path, tied):
    (tmp_path / "empty").mkdir()
    for source, why in (
        (tmp_path / "empty", "holds no encoder.pth and no adapter_config.json"),
        (tied, "holds no encoder.pth and no adapter_config.json"),
        (tied / "config.json", "is a file: give the folder that holds encoder.pth"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        text = refused(tmp_path, source)
        assert why in text
        assert "\n" not in text


@pytest.mark.parametrize("source", ["nobody/nothing", ""])
def test_a_hub_repo_that_cannot_be_had_is_one_line(tmp_path, source):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "\n" not in refused(tmp_path, source)


# ---- the destination ----


def test_an_adapter_is_replaced_only_by_force(tmp_path):
    path = convert(tmp_path, make())
    source = make(k=2).write(tmp_path / "other")
    before = {name: (path / name).read_bytes() for name in FILES}
    with pytest.raises(AdapterError, match="exists: choose another folder, or give `force`"):
        convert_checkpoint(str(source), path)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    convert_checkpoint(str(source), path, force=True)
    assert load_adapter(path).merge.encoder.merge_factor == 2


def test_a_failed_conversion_leaves_the_adapter_it_was_to_replace(tmp_path):
    path = convert(tmp_path, make())
    before = {name: (path / name).read_bytes() for name in FILES}
    made = make(k=2)
    made.encoder["net.0.bias"][0] = np.nan
    source = made.write(tmp_path / "other")
    with pytest.raises(CheckpointError, match="diverged"):
        convert_checkpoint(str(source), path, force=True)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "other", "src"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "checkpoint"])
def test_what_is_not_an_adapter_is_never_replaced(tmp_path, kind):
    path, source = tmp_path / "dst", make().write(tmp_path / "src")
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        (path / "precious").mkdir(parents=True)
    elif kind == "link":
        path.symlink_to(source)
    else:
        path = source
    assert "`force` replaces" in refused_at(path, source, force=True)
    assert "exists: choose another folder" in refused_at(path, source)


def refused_at(path, source, **options) -> str:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(AdapterError) as caught:
        convert_checkpoint(str(source), path, **options)
    assert sorted(path.parent.rglob("*")) == before
    return str(caught.value)


def test_a_place_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    source = make().write(tmp_path / "src")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AdapterError, match=r"cannot write .*/file/dst: ") as caught:
        convert_checkpoint(str(source), tmp_path / "file" / "dst")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
