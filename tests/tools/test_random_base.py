"""Bases of a known shape: their sizes against the published ones, and their weights."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from kmerge_mlx.adapters.schema import EncoderConfig, inner_size
from kmerge_mlx.errors import ModelError
from kmerge_mlx.tools import bench as benchmark
from kmerge_mlx.tools import random_base
from kmerge_mlx.tools.random_base import RandomBase
from kmerge_mlx.tools.shapes import SHAPES
from tests.tiny import qwen2_config

# As the hub counts the tensors of each model, the tied head once.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-4b": 4_022_468_096,
}
TINY = RandomBase("tiny", qwen2_config(), "bfloat16")


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_the_published_model(name):
    llm = RandomBase(name, SHAPES[name], "bfloat16").skeleton()
    assert get_total_parameters(llm) == PUBLISHED[name]
    assert {array.dtype for _, array in tree_flatten(llm.parameters())} == {mx.bfloat16}


def test_the_weights_are_random_and_the_same_each_time():
    first, second = (dict(tree_flatten(TINY.make().parameters())) for _ in range(2))
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    assert mx.std(first["model.layers.0.mlp.up_proj.weight"].astype(mx.float32)).item() > 0.01


def test_every_side_reads_the_same_weights_and_only_the_merged_one_has_lora():
    plain, floor, merged = benchmark.load_sides(TINY, {4: None}, (40,), 4)
    assert plain.llm is floor.llm
    held = {id(array) for _, array in tree_flatten(plain.llm.parameters())}
    names = dict(tree_flatten(merged.llm.parameters()))
    assert held <= {id(array) for array in names.values()}
    assert any("lora_a" in name for name in names)
    none = benchmark.load_sides(TINY, {4: None}, (40,), 0)[2]
    assert not [name for name, _ in tree_flatten(none.llm.parameters()) if "lora_a" in name]


def test_what_does_not_fit_is_refused_before_a_weight_is_made(monkeypatch):
    monkeypatch.setattr(RandomBase, "make", None)
    monkeypatch.setattr(random_base, "usable_memory", lambda: 5_000_000_000)
    base = RandomBase("qwen3-4b", SHAPES["qwen3-4b"], "bfloat16")
    # 8.04 GB of weights, 36 layers x 8 heads x 128 x 2 x 2 bytes x 2,048 positions, an encoder.
    said = r"`shape` qwen3-4b in bfloat16 takes 9\.\d GB .* 5\.0 GB .* choose a smaller `shape`"
    with pytest.raises(ModelError, match=said):
        benchmark.load_sides(base, {4: None}, (512, 2048), 4)


def test_weights_cache_and_every_encoder_count(monkeypatch):
    weights = 2 * get_total_parameters(TINY.skeleton())
    # 64 positions take the room of 256: 2 layers, 2 heads of 32, keys and values, 2 bytes.
    cache = 256 * 2 * 2 * 32 * 2 * 2
    encoders = sum(4 * EncoderConfig(k, 64, inner_size(k, 64)).num_parameters for k in (2, 3))
    monkeypatch.setattr(random_base, "usable_memory", lambda: weights + cache + encoders)
    TINY.check_memory((64,), (2, 3))
    with pytest.raises(ModelError, match="choose a smaller `shape`"):
        TINY.check_memory((64, 257), (2, 3))
    with pytest.raises(ModelError, match="choose a smaller `shape`"):
        TINY.check_memory((64,), (2, 4))
