"""The .pth reader against hostile and damaged files: one line of CheckpointError, nothing run.

Needs no torch; test_torch_read.py compares with it, and reads mutated files in bulk.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path

import pytest

from kmerge_mlx.convert.torch_read import read_state_dict
from kmerge_mlx.errors import CheckpointError
from tests.hostile_torch_files import EXECUTING, FOREIGN, hostile_files
from tests.hostile_torch_parts import DATA, Record, checkpoint, pack, state, tensor, text

FIXTURE = Path(__file__).parents[1] / "fixtures/upstream_tied_k4/checkpoint/encoder.pth"


def refusal(path: Path) -> str:
    """The message of the one error that reading the file must raise."""
    with pytest.raises(CheckpointError) as error:
        read_state_dict(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 600
    return message.removeprefix(f"{path}: ")


def test_the_parts_of_the_hostile_files_make_good_files(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(checkpoint(state(text("w"), tensor(), text("b"), tensor(0, (2, 2), (1, 2)))))
    assert read_state_dict(path)["b"].tolist() == [[1, 3], [2, 4]]
    good = read_state_dict(path)["w"].tolist()
    path.write_bytes(pack([Record("r/data.pkl", state()), Record("r/data/0", DATA)]))
    assert read_state_dict(path)["w"].tolist() == good  # little-endian without saying so
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("r/data.pkl", state()), ("r/data/0", DATA)):
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(data)
    assert read_state_dict(path)["w"].tolist() == good == [1, 2, 3, 4]


@pytest.mark.parametrize("name", EXECUTING)
def test_a_pickle_that_pickle_would_execute_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    path.write_bytes(checkpoint(EXECUTING[name]))
    refusal(path)
    assert list(tmp_path.iterdir()) == [path]
    with contextlib.suppress(Exception):  # after its deed, or for want of a whole state dict
        pickle.loads(EXECUTING[name])
    assert (tmp_path / "EXECUTED").exists()  # so the reader had something to refuse


def test_every_hostile_file_is_refused_in_one_line(tmp_path, monkeypatch):
    """But for those that fill memory, which test_torch_read.py reads in a process of their own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    for name, content in hostile_files(bombs=False):
        path.write_bytes(content)
        assert refusal(path), name
        assert list(tmp_path.iterdir()) == [path], name


def test_what_cannot_be_read_says_what_it_is_and_what_to_do(tmp_path):
    path, pipe = tmp_path / "x.pth", tmp_path / "pipe"
    for length in (0, 22, 98, -99, -22, -1):
        path.write_bytes(FIXTURE.read_bytes()[:length])
        assert "download it again" in refusal(path)
    path.write_bytes(FOREIGN["a_git_lfs_pointer"])
    assert "git lfs pull" in refusal(path)
    assert "No such file" in refusal(tmp_path / "missing.pth")
    assert "found a directory" in refusal(tmp_path)
    os.mkfifo(pipe)
    assert "a device or a pipe" in refusal(pipe)
