"""The two config files: what is written is read back, and nonsense is refused in one go."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from kmerge_mlx.adapters.schema import BaseModelConfig, EncoderConfig, LoRASpec, MergeConfig
from kmerge_mlx.adapters.tuning import FullConfig, LoRAConfig, read_tuning
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.prompts.policy import ALL, Layout

MERGE = MergeConfig(
    EncoderConfig(4, 64, 384),
    BaseModelConfig("Qwen/Qwen2.5-0.5B", {"hidden_size": 64, "rope_theta": 1e6}),
    223,
    LoRASpec(4, 4.0),
    Layout(ALL, chat_template=False),
    {"metrics": {"accuracy": 98.38}},
)
LORAS = [
    LoRAConfig(3, 0.05, LoRASpec(4, 4.0), ("self_attn.q_proj", "lm_head")),
    LoRAConfig(3, 0.0, modules={"model.layers.0.mlp.up_proj": LoRASpec(8, 0.5)}),
    LoRAConfig(0, 0.0, LoRASpec(4, 4.0)),
]


@pytest.mark.parametrize(
    "merge",
    [
        MERGE,
        MergeConfig(EncoderConfig(2, 8, 8)),
        MergeConfig(EncoderConfig(2, 8, 8, 3)),
        MergeConfig(None, head_lora=LoRASpec(4, 4.0)),
    ],
)
def test_merge_config_survives_its_file(merge):
    assert MergeConfig.from_json(json.loads(json.dumps(merge.to_json()))) == merge


@pytest.mark.parametrize(
    ("stored", "layout"),
    [
        (None, None),
        ({}, None),
        ({"chat_template": False}, Layout(ALL, chat_template=False)),
        ({"merged": "prompt", "chat_template": False}, Layout(ALL, chat_template=False)),
        ({"merges": "contexts", "threshold": 9, "chat_template": True}, Layout("contexts", 9)),
    ],
)
def test_earlier_releases_layouts_are_understood(stored, layout):
    assert MergeConfig.from_json(MERGE.to_json() | {"layout": stored}).layout == layout


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"merges": "some"}, "merges is 'some', expected all or contexts"),
        ({"threshold": 0}, "threshold is 0, expected a whole number >= 1"),
        ({"threshold": True}, "threshold is True"),
        ({"chat_template": 1}, "chat_template is 1, expected true or false"),
        ({"colour": 1}, "layout has colour, which this release does not know: update kmerge-mlx"),
    ],
)
def test_a_bad_layout_is_named(stored, message):
    with pytest.raises(AdapterError, match=message):
        MergeConfig.from_json(MERGE.to_json() | {"layout": stored})


def test_the_context_is_always_written_and_0_where_it_is_not():
    data = MERGE.to_json()
    assert data.pop("encoder_context") == 0
    assert MergeConfig.from_json(data) == MERGE


def test_without_an_encoder_k_is_1_and_its_sizes_are_null():
    data = MergeConfig(None).to_json()
    assert [data[name] for name in ("merge_factor", "hidden_size", "inner_size")] == [1, None, None]
    assert MergeConfig(None).merge_factor == 1
    assert MERGE.merge_factor == 4


@pytest.mark.parametrize("tuning", [*LORAS, FullConfig(3), FullConfig(-1), FullConfig(0)])
def test_a_tuning_survives_its_file(tuning):
    assert read_tuning(json.loads(json.dumps(tuning.to_json()))) == tuning


@pytest.mark.parametrize("num_layers", [None, -2, "3", 1.0, True])
def test_a_bad_full_config_is_refused(num_layers):
    with pytest.raises(AdapterError, match=r"num_layers is .*, expected a whole number, or -1"):
        read_tuning({"fine_tune_type": "full", "num_layers": num_layers})


def test_the_uniform_form_is_mlx_lms_and_the_other_has_no_scale_to_misread():
    uniform, by_module = (lora.to_json()["lora_parameters"] for lora in LORAS[:2])
    assert set(uniform) == {"rank", "scale", "dropout", "keys"}
    assert "scale" not in by_module


def test_configs_cannot_be_changed():
    for config in (MERGE, LORAS[0], MERGE.encoder):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.num_layers = 3


def test_the_hash_depends_on_the_fields_and_not_on_their_order():
    one = BaseModelConfig("a", {"x": 1, "y": 2})
    assert one.config_hash == BaseModelConfig("b", {"y": 2, "x": 1}).config_hash
    assert one.config_hash != BaseModelConfig("a", {"x": 1, "y": 3}).config_hash
    assert BaseModelConfig("a").config_hash is None


def test_only_fields_that_both_bases_name_can_differ():
    base = BaseModelConfig("a", {"x": 1, "y": 2})
    assert base.differences({"x": 1, "z": 3}) == []
    assert base.differences({"x": 5, "y": 2}) == ["x is 5, the adapter was made for 1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2 is newer"),
        ({"format_version": None}, "format_version is None"),
        ({"merge_factor": 0}, "merge_factor is 0, expected a whole number of at least 2"),
        ({"merge_factor": 1}, "hidden_size is 64, inner_size is 384, .*merge_factor 1 has no enc"),
        ({"encoder_context": -1}, "encoder_context is -1, expected a whole number of at least 0"),
        ({"encoder_context": 3.0}, r"encoder_context is 3\.0"),
        ({"merge_factor": 4.0}, r"merge_factor is 4\.0"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"head_lora": {"rank": 4}}, "head_lora is"),
        ({"head_lora": {"rank": 4, "scale": math.nan}}, "finite scale"),
        ({"base_model": {"id": 3, "config": {}}}, r"base_model\.id is 3"),
        ({"base_model": []}, r"base_model is \[\]"),
        ({"base_model": {"config": {"hidden_size": 1}, "config_hash": "sha256:0"}}, "was edited"),
        ({"provenance": "x"}, "provenance is 'x'"),
    ],
)
def test_a_bad_entry_of_merge_config_is_named(change, message):
    with pytest.raises(AdapterError, match=message):
        MergeConfig.from_json(MERGE.to_json() | change)


def test_all_bad_entries_are_listed_at_once():
    with pytest.raises(AdapterError) as error:
        MergeConfig.from_json(MERGE.to_json() | {"layout": 1, "pad_token_id": "x"})
    assert "layout is 1" in str(error.value)
    assert "pad_token_id is 'x'" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"fine_tune_type": "dora"},
        {"fine_tune_type": ["lora"]},
        {"num_layers": -1},
        {"num_layers": "3"},
        {"lora_parameters": None},
        {"lora_parameters": {"rank": 0, "scale": 1.0, "dropout": 0.0, "keys": []}},
        {"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 2.0, "keys": []}},
        {"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": "q_proj"}},
        {"lora_parameters": {"rank": 4, "dropout": 0.0, "keys": []}},
        {"lora_parameters": {"modules": {"a": {"rank": 4}}}},
        {"lora_parameters": {"modules": []}},
    ],
)
def test_a_bad_lora_config_is_refused(change):
    with pytest.raises(AdapterError):
        read_tuning(LORAS[0].to_json() | change)
