"""The two config files: what is written is read back, and nonsense is refused in one go."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from kmerge_mlx.adapters.schema import (
    BaseModelConfig,
    EncoderConfig,
    FullConfig,
    LoRAConfig,
    LoRASpec,
    MergeConfig,
    read_tuning,
)
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.prompts.policy import ALL, DEFAULT_LAYOUT, Layout, chosen

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


def test_what_is_written_is_read_back():
    for merge in (
        MERGE,
        MergeConfig(EncoderConfig(2, 8, 8)),
        MergeConfig(EncoderConfig(2, 8, 8, 3)),
        MergeConfig(None, head_lora=LoRASpec(4, 4.0)),
    ):
        assert MergeConfig.from_json(json.loads(json.dumps(merge.to_json()))) == merge
    data = MergeConfig(None).to_json()
    assert [data[name] for name in ("merge_factor", "hidden_size", "inner_size")] == [1, None, None]
    for tuning in (*LORAS, FullConfig(3), FullConfig(-1), FullConfig(0)):
        assert read_tuning(json.loads(json.dumps(tuning.to_json()))) == tuning


def test_earlier_releases_files_are_understood():
    for stored, layout in (
        (None, None),
        ({}, None),
        ({"chat_template": False}, Layout(ALL, chat_template=False)),
        ({"merged": "prompt", "chat_template": False}, Layout(ALL, chat_template=False)),
        ({"merges": "contexts", "threshold": 9, "chat_template": True}, Layout("contexts", 9)),
        ({"merges": "documents", "threshold": 9, "chat_template": True}, Layout("documents", 9)),
    ):
        assert MergeConfig.from_json(MERGE.to_json() | {"layout": stored}).layout == layout
    data = MERGE.to_json()
    assert data.pop("encoder_context") == 0  # the first adapters do not name it
    assert MergeConfig.from_json(data) == MERGE


def test_an_adapter_goes_on_being_read_as_it_was_trained_whatever_the_default_is():
    """0.1.0 wrote ``contexts``, its default; what it left open, it read in the same way."""
    assert DEFAULT_LAYOUT.merges == "documents"
    for stored in (Layout("contexts"), Layout("documents"), Layout(ALL)):
        kept = replace(MERGE, layout=stored).to_json()
        assert set(kept["layout"]) == {"merges", "threshold", "chat_template"}
        assert chosen(MergeConfig.from_json(kept).layout) == stored
    assert chosen(None) == Layout("contexts")
    assert chosen(Layout("contexts"), "documents") == Layout("documents")


def test_the_uniform_form_is_mlx_lms_and_the_other_has_no_scale_to_misread():
    uniform, by_module = (lora.to_json()["lora_parameters"] for lora in LORAS[:2])
    assert set(uniform) == {"rank", "scale", "dropout", "keys"}
    assert "scale" not in by_module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"format_version": v}, "expected up to 2") for v in (None, 0, 3, "1", True, 1.0)),
        ({"merge_factor": 0}, "merge_factor is 0, expected a whole number of at least 2"),
        ({"merge_factor": 1}, "hidden_size is 64, expected null: merge_factor 1 has no"),
        ({"encoder_context": -1}, "encoder_context is -1, expected a whole number of at least 0"),
        *(
            ({"encoder_quantization": value}, "expected null or bits of .* and a group_size of")
            for value in ({"bits": 7, "group_size": 64}, {"bits": 4}, 4)
        ),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"head_lora": {"rank": 4, "scale": math.nan}}, "finite scale"),
        ({"base_model": {"id": 3, "config": {}}}, r"base_model\.id is 3"),
        ({"base_model": {"config": {"hidden_size": 1}, "config_hash": "sha256:0"}}, "was edited"),
        ({"layout": 1, "pad_token_id": "x"}, "(?s)layout is 1.*pad_token_id is 'x'"),
        (
            {"layout": {"merges": "some"}},
            "merges is 'some', expected one of documents, con",
        ),
        ({"layout": {"colour": 1}}, "layout has colour, which this release does not know: update"),
    ],
    ids=str,
)
def test_a_bad_entry_of_merge_config_is_named(change, message):
    with pytest.raises(AdapterError, match=message):
        MergeConfig.from_json(MERGE.to_json() | change)


def test_a_bad_adapter_config_is_refused():
    parameters = {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": []}
    for change in (
        {"fine_tune_type": "dora"},
        {"num_layers": -1},
        {"lora_parameters": None},
        {"lora_parameters": parameters | {"dropout": 1.0}},
        {"lora_parameters": parameters | {"keys": "q_proj"}},
        {"lora_parameters": parameters | {"scale": None}},
        {"lora_parameters": {"modules": {"a": {"rank": 4}}}},
    ):
        with pytest.raises(AdapterError, match=r"adapter_config|LoRA with rank"):
            read_tuning(LORAS[0].to_json() | change)
    for layers in (None, -2, "3", 1.0, True):
        with pytest.raises(AdapterError, match=r"num_layers is .*, expected a count or -1"):
            read_tuning({"fine_tune_type": "full", "num_layers": layers})
