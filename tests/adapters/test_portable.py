"""What an adapter says of its base and its origin: found from anywhere, without paths."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from kmerge_mlx.adapters.folder import Adapter, load_adapter, look_up, save_adapter
from kmerge_mlx.adapters.portable import found_id, stored_id, without_paths
from kmerge_mlx.adapters.schema import BaseModelConfig
from tests.cli_runner import change_json
from tests.saved_adapters import make


def made_on(name: str, **provenance: object) -> Adapter:
    adapter = make()
    known = replace(adapter.merge, base=BaseModelConfig(name), provenance=provenance)
    return replace(adapter, merge=known)


def test_a_base_and_its_adapter_may_be_moved_together(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(home)
    for name in ("models/base", str(home / "models" / "base")):
        for path in (home / "run", home / "run" / "best"):  # as training leaves it
            save_adapter(made_on(name, source=str(home), data="~/rows"), path)
            assert all(str(tmp_path).encode() not in f.read_bytes() for f in path.glob("*.*"))
        assert look_up(home / "run" / "best").base == str(home / "models" / "base")
        monkeypatch.chdir("/")
        home = home.rename(tmp_path / f"moved{len(name)}")
        for path in (home / "run", home / "run" / "best"):
            assert look_up(path).base == str(home / "models" / "base")
            assert load_adapter(path).merge.provenance == {"source": "home", "data": "rows"}
        home = home.rename(tmp_path / "home")
        monkeypatch.chdir(home)


def test_what_earlier_releases_recorded_means_what_it_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    save_adapter(make(), tmp_path / "deep" / "adapter")
    for name in (str(tmp_path / "base"), "./base", "base", "user/base", "/gone/base", None):
        config = tmp_path / "deep" / "adapter" / "merge_config.json"
        change_json(config, base_model={"id": name})
        assert look_up(tmp_path / "deep" / "adapter").base == name


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *((name, name) for name in (None, "bundled", "user/base", "user/base@v1", "gpt2")),
        ("models/base", "../models/base"),
        ("x" * 5000, "x" * 5000),
        ("adapter", "./"),
        ("/home/jane/models/Qwen2.5-0.5B", "Qwen2.5-0.5B"),
        ("~/models/base/", "base"),
        (r"C:\Users\jane\base", "base"),
    ],
)
def test_a_base_is_stored_by_name_or_from_the_adapters_folder(tmp_path, monkeypatch, name, stored):
    monkeypatch.chdir(tmp_path)
    for folder in ("adapter", "models/base", "bundled"):
        (tmp_path / folder).mkdir(parents=True)
    found = stored_id(name, Path("adapter"))
    assert found == ("./." if stored == "./" else stored)
    if stored and stored.startswith("."):
        assert found_id(found, Path("adapter")) == os.path.realpath(name)


def test_a_version_in_the_hubs_cache_is_stored_by_its_repo(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / commit
    folder.mkdir(parents=True)
    assert stored_id(str(folder), tmp_path) == f"Qwen/Qwen2.5-0.5B@{commit}"


def test_paths_are_cut_to_their_last_part_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("HOME", "/Users/jane doe")
    for text, cut in (
        ("/Users/jane doe/runs/best", "best"),
        (
            "left out: cannot read /Users/jane doe/x/metrics.json: gone",
            "left out: cannot read metrics.json: gone",
        ),
        ("rows: ~jane/rows and ~/rows, ../../jane/more", "rows: rows and rows, more"),
        ("--data=/home/jane/data (/tmp/jane/notes.md)", "--data=data (notes.md)"),
        ("file:///home/jane/rows.jsonl", "rows.jsonl"),
        ("see file:///home/jane/rows.jsonl", "see rows.jsonl"),
        (r"read C:\Users\jane\rows.jsonl", "read rows.jsonl"),
        (r"\\server\jane\rows", "rows"),
        ("outputs/best", "outputs/best"),
        ("./data", "./data"),
        ("https://hub/Users/jane doe/a and 3/4 and/or s3://a/b", None),
    ):
        assert without_paths(text) == (text if cut is None else cut)
    assert without_paths({"/home/jane/a": [{"b": "/home/jane/c"}, 1, None]}) == {
        "a": [{"b": "c"}, 1, None]
    }
