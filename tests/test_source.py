"""Names are resolved once: the right base and adapter, and every config file read a single time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kmerge_mlx import bundled
from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.adapters.schema import BaseModelConfig
from kmerge_mlx.errors import AdapterError, ModelError
from kmerge_mlx.model import load, merged_embedding
from kmerge_mlx.source import Source
from tests.tiny import build, qwen2_config, random_adapter, write_base


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """``base``, adapters for it in ``many`` (K = 2 and 4), and ``carrying``: a base with one."""
    root = tmp_path_factory.mktemp("world")
    write_base(root / "base", qwen2_config())
    for k in (2, 4):
        adapter = random_adapter(build(qwen2_config()), k)
        merge = replace(adapter.merge, base=BaseModelConfig(str(root / "base")))
        save_adapter(replace(adapter, merge=merge), root / "many" / f"k{k}")
    write_base(root / "carrying", qwen2_config())
    save_adapter(random_adapter(build(qwen2_config()), 4), root / "carrying" / "kmerge")
    return root


def test_all_k_of_a_folder_are_found(world):
    sources = Source.find_all(None, world / "many")
    assert [source.k for source in sources] == [2, 4]
    assert [source.adapter for source in sources] == [world / "many" / "k2", world / "many" / "k4"]
    # Without an adapter for it, K = 1 is the base alone.
    alone, merging = Source.find_all(None, world / "many", [4, 1])
    assert (alone.k, alone.adapter, alone.path) == (1, None, world / "base")
    assert merging.k == 4
    assert [s.k for s in Source.find_all(str(world / "base"))] == [1]


def test_the_base_is_the_named_one_or_the_adapters(world):
    found = Source.find(None, world / "many", 4)
    assert (found.model, found.path) == (str(world / "base"), world / "base")
    assert found.adapter_path == str(world / "many")
    other = Source.find(str(world / "carrying"), world / "many", 2)
    assert (other.path, other.k) == (world / "carrying", 2)
    alone = Source.find(str(world / "base"))
    assert (alone.adapter, alone.merge, alone.k) == (None, None, 1)


def test_a_model_folder_stands_for_the_adapter_it_carries_and_the_other_way_round(world):
    carrying = world / "carrying"
    for names in ((str(carrying), None), (None, carrying), (None, carrying / "kmerge")):
        found = Source.find(*names)
        assert (found.path, found.adapter) == (carrying, carrying / "kmerge")


def test_nothing_named_is_the_bundled_model():
    for source in (Source.find(), Source.find(bundled.BUNDLED), Source.find(k=4)):
        assert (source.path, source.k) == (bundled.BASE, 4)
        assert source.model == source.adapter_path == bundled.BUNDLED
    assert Source.find(k=2).k == 2


def test_what_cannot_be_found_is_one_line(world, tmp_path):
    with pytest.raises(AdapterError, match="`k` is 4, and there is no merge encoder: give `adap"):
        Source.find(str(world / "base"), k=4)
    with pytest.raises(AdapterError, match="`k` is 4, and there is no merge encoder"):
        Source.find_all(str(world / "base"), ks=[1, 4])
    for k, text in ((None, "K = 2, 4: choose one with `k`"), (1, "no adapter for `k` 1: it has")):
        with pytest.raises(AdapterError, match=text):
            Source.find(None, world / "many", k)
    with pytest.raises(AdapterError, match="no adapter for `k` 3: it has K = 2, 4"):
        Source.find_all(None, world / "many", [3])
    save_adapter(random_adapter(build(qwen2_config()), 4), tmp_path / "nameless")
    with pytest.raises(ModelError, match="nameless does not name its base model: give `model`"):
        Source.find(None, tmp_path / "nameless")


def test_in_python_a_base_is_loaded_alone_unless_its_adapter_is_named(world):
    carrying = str(world / "carrying")
    assert merged_embedding(load(carrying)[0]) is None
    assert merged_embedding(load(carrying, carrying)[0]).merge_factor == 4
    assert merged_embedding(load(bundled.BUNDLED)[0]) is None
