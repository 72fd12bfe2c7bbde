"""Full fine-tuning adapters: mlx-lm's own files, loaded strictly."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import Segment, load
from kmerge_mlx.adapters.folder import Adapter, load_adapter, save_adapter
from kmerge_mlx.adapters.schema import FullConfig, LoRAConfig
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.model import attach, merged_embedding, wire
from tests.tiny import PAD, build, qwen2_config, random_adapter, write_base


def full_adapter(num_layers: int = 1, k: int = 4, head: bool = False) -> Adapter:
    """An adapter whose layers are another model's."""
    other, start = build(qwen2_config(), seed=9), random_adapter(build(qwen2_config()), k)
    layers = range(2)[-max(num_layers, 0) :]
    weights = {
        name: array
        for name, array in tree_flatten(other.parameters())
        if any(name.startswith(f"model.layers.{i}.") for i in layers)
    }
    merge = random_adapter(build(qwen2_config()), k, head=head).merge
    head_weights = start.head_weights if head else {}
    return Adapter(merge, FullConfig(num_layers), weights, start.encoder_weights, head_weights)


@pytest.mark.parametrize("num_layers", [1, -1])
def test_mlx_lm_loads_the_same_layers(tmp_path, num_layers):
    base = write_base(tmp_path / "base", qwen2_config())
    save_adapter(full_adapter(num_layers), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config == {"fine_tune_type": "full", "num_layers": num_layers, "model": None}
    ours, _ = load(str(base), tmp_path / "a")
    theirs, _ = mlx_lm.utils.load(str(base), adapter_path=str(tmp_path / "a"))
    ids = mx.array([[5, 6, 7, 8]])
    assert mx.array_equal(ours(ids), theirs(ids))
    assert mx.abs(ours(ids) - build(qwen2_config())(ids)).max().item() > 0.1


def test_layers_head_and_encoder_act_together(tmp_path):
    """Wherever the other model's layers stand, the logits are those of that model's layers."""
    adapter = full_adapter(-1, head=True)
    save_adapter(adapter, tmp_path / "a")
    found, wanted = build(qwen2_config()), build(qwen2_config())
    attach(found, load_adapter(tmp_path / "a"), PAD)
    wanted.model.layers = build(qwen2_config(), seed=9).model.layers
    parts = (adapter.encoder_weights, adapter.head_weights)
    attach(wanted, Adapter(adapter.merge, LoRAConfig(0), {}, *parts), PAD)
    logits = [
        m(mx.array([merged_embedding(m).compress([Segment(list(range(1, 20)))]).ids]))
        for m in (found, wanted)
    ]
    assert mx.array_equal(*logits)


def test_every_layer_tensor_that_does_not_fit_is_listed():
    adapter = full_adapter(1)
    weights = adapter.tuning_weights
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.1.mlp.down_proj.weight"] = mx.zeros((3, 4))
    weights["model.layers.0.mlp.up_proj.weight"] = mx.zeros((128, 64))
    weights["model.norm.weight"] = mx.zeros((64,))
    weights["model.layers.1.input_layernorm.weight"] = mx.zeros((64,), mx.int32)
    with pytest.raises(AdapterError) as error:
        attach(build(qwen2_config()), adapter, PAD, "this")
    for text in (
        "the adapter does not fit this: 5 problems",
        "model.layers.1.mlp.up_proj.weight is missing, expected shape (128, 64)",
        "down_proj.weight has shape (3, 4), expected (64, 128)",
        "model.layers.0.mlp.up_proj.weight (128, 64) belongs to nothing here",
        "model.norm.weight (64,) belongs to nothing here",
        "input_layernorm.weight has dtype mlx.core.int32",
    ):
        assert text in str(error.value)


def test_a_quantized_base_is_refused_in_one_line():
    model = build(qwen2_config())
    nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(AdapterError, match="which is quantized in this: use LoRA, or a") as error:
        attach(model, full_adapter(1), PAD, "this")
    assert "\n" not in str(error.value)
    assert "model.layers.1." in str(error.value)
    model = build(qwen2_config())
    only_the_table = {"class_predicate": lambda path, _: path == "model.embed_tokens"}
    nn.quantize(model, group_size=32, bits=4, **only_the_table)
    attach(model, full_adapter(1), PAD)


def test_more_layers_than_there_are_are_refused():
    adapter = full_adapter(1)
    adapter = Adapter(adapter.merge, FullConfig(3), adapter.tuning_weights, adapter.encoder_weights)
    with pytest.raises(AdapterError, match="this has 2 layers, full fine-tuning covers 3"):
        wire(build(qwen2_config()), adapter.merge, adapter.tuning, PAD, "this")
