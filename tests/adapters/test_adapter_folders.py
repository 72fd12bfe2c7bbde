"""Folders around adapters: several K in one, something else in one, where one may be written.

A save replaces an adapter whole or not at all, and nothing that is no adapter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from kmerge_mlx.adapters.folder import (
    FILES,
    Adapter,
    check_adapter_destination,
    find_adapters,
    load_adapter,
    save_adapter,
)
from kmerge_mlx.adapters.schema import MergeConfig
from kmerge_mlx.errors import AdapterError
from tests.saved_adapters import make, refused, saved

# ---- several K in one folder ----


def test_a_folder_of_several_k_asks_which_and_gives_each(tmp_path):
    for k in (10, 2, 4):
        saved(tmp_path / f"k{k}", k=k)
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("")
    assert [*find_adapters(tmp_path).items()] == [
        *((2, tmp_path / "k2"), (4, tmp_path / "k4"), (10, tmp_path / "k10"))
    ]
    for k in (2, 4, 10):
        assert load_adapter(tmp_path, k).merge.encoder.merge_factor == k
    assert "holds adapters for K = 2, 4, 10: choose one with `k`" in refused(tmp_path)
    assert "holds no adapter for `k` 3: it has K = 2, 4, 10" in refused(tmp_path, 3)
    assert "holds no adapter for `k` 3: it has K = 4" in refused(tmp_path / "k4", 3)


def test_two_adapters_of_one_k_are_not_picked_from_by_chance(tmp_path):
    saved(tmp_path / "old", k=4)
    saved(tmp_path / "new", k=4)
    assert "several adapters for K = 4: name one of new, old" in refused(tmp_path, 4)


def test_what_a_killed_run_left_is_not_offered_as_an_adapter(tmp_path):
    saved(tmp_path / "k4", k=4)
    saved(tmp_path / ".k2.new-123-abc", k=2)
    assert list(find_adapters(tmp_path)) == [4]


# ---- folders that are something else ----


def test_what_a_folder_is_instead_is_said(tmp_path, checkpoint_path, base_path):
    peft, mlx, sub, nothing = (tmp_path / name for name in ("peft", "mlx", "sub", "nothing"))
    shutil.copytree(checkpoint_path, peft)
    (peft / "encoder.pth").unlink()
    shutil.copytree(checkpoint_path, sub / "best")
    saved(mlx)
    (mlx / "merge_config.json").unlink()
    nothing.mkdir()
    for path, what in (
        (
            checkpoint_path,
            f"is a PyTorch checkpoint: run `kmerge-mlx convert {checkpoint_path} DST`",
        ),
        (sub, f"holds PyTorch checkpoints: run `kmerge-mlx convert {sub} DST` first"),
        (peft, "is a PEFT adapter without a merge encoder: convert the whole checkpoint folder"),
        (mlx, "is an mlx-lm adapter without a merge encoder (merge_config.json is missing)"),
        (base_path, "is a base model, not an adapter: give it as --model"),
        (nothing, "is no adapter folder: merge_config.json is missing"),
        (tmp_path / "absent", "is not a folder: expected an adapter"),
        (base_path / "config.json", "is not a folder: expected an adapter"),
        (tmp_path / ("x" * 300), "is not a folder"),
    ):
        text = refused(path)
        assert text.startswith((f"{path} ", "cannot read"))
        assert what in text or "File name too long" in text
    (mlx / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in refused(mlx)


# ---- where an adapter may be written ----


def test_a_new_place_is_free_and_an_old_one_needs_force(tmp_path):
    check_adapter_destination(tmp_path / "new", force=False)
    check_adapter_destination(tmp_path / "new", force=True)
    path = saved(tmp_path / "a")
    check_adapter_destination(path, force=True)
    with pytest.raises(AdapterError, match="exists: choose another folder, or give --force"):
        check_adapter_destination(path, force=False)


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link", "dangling", "several"])
def test_force_replaces_nothing_but_an_adapter(tmp_path, kind):
    path = tmp_path / "dst"
    if kind == "folder":
        path.mkdir()
        (path / "precious.txt").write_text("1")
    elif kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("1")
    elif kind == "link":
        path.symlink_to(saved(tmp_path / "a"))
    elif kind == "dangling":
        path.symlink_to(tmp_path / "absent")
    else:
        saved(path / "k4")
    why = "symbolic link" if kind in ("link", "dangling") else "no adapter folder"
    with pytest.raises(AdapterError, match=f"is (a |){why}, and --force replaces "):
        check_adapter_destination(path, force=True)
    with pytest.raises(AdapterError, match="exists"):
        check_adapter_destination(path, force=False)


def test_force_does_not_delete_what_lies_beside_an_adapter(tmp_path):
    path = saved(tmp_path / "a")
    (path / "training").mkdir()
    with pytest.raises(AdapterError, match=r"more than adapter files \(training\): move"):
        check_adapter_destination(path, force=True)


def test_a_name_that_no_disk_takes_is_one_line(tmp_path):
    with pytest.raises(AdapterError, match=r"cannot write .*File name too long"):
        check_adapter_destination(tmp_path / ("x" * 300), force=False)


def test_a_place_inside_a_file_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("1")
    check_adapter_destination(tmp_path / "file" / "a", force=False)
    with pytest.raises(AdapterError, match=r"cannot write .*/file/a: "):
        save_adapter(make(), tmp_path / "file" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_loop_of_links_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(AdapterError, match="cannot write"):
        save_adapter(make(), tmp_path / "loop" / "a")


def test_a_folder_that_a_killed_run_was_replacing_is_given_back_before_it_is_asked_about(tmp_path):
    pid = subprocess.check_output(
        [sys.executable, "-c", "import os; print(os.getpid())"], text=True
    )
    saved(tmp_path / f".a.old-{int(pid)}-x")
    with pytest.raises(AdapterError, match="exists"):
        check_adapter_destination(tmp_path / "a", force=False)
    assert load_adapter(tmp_path / "a").merge.encoder.merge_factor == 4
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_a_save_that_fails_leaves_the_adapter_that_was_there(tmp_path):
    path = saved(tmp_path / "a")
    before = {name: (path / name).read_bytes() for name in FILES}
    adapter = make(k=2)
    huge = MergeConfig(adapter.merge.encoder, provenance={"log": "x" * (2 << 20)})
    broken = Adapter(huge, adapter.tuning, adapter.tuning_weights, adapter.encoder_weights)
    with pytest.raises(
        AdapterError, match=r"cannot write .*merge_config\.json would be over 1 MiB"
    ):
        save_adapter(broken, path)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_numpy_reads_the_same_numbers(tmp_path):
    adapter = make()
    save_adapter(adapter, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapters.safetensors")
    assert stored.keys() == adapter.tuning_weights.keys()
    for name, array in stored.items():
        assert array.tobytes() == np.array(adapter.tuning_weights[name]).tobytes()
