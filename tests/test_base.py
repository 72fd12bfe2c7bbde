"""What a base model's config says, and how it is found."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from kmerge_mlx import base
from kmerge_mlx.errors import ModelError


def test_rope_parameters_become_the_older_names():
    fixed = base.normalise({"rope_parameters": {"rope_theta": 5e3, "rope_type": "default"}})
    assert fixed["rope_theta"] == 5e3
    assert "rope_scaling" not in fixed
    older = {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e3}}
    assert base.normalise(older)["rope_theta"] == 1e4
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    assert base.normalise({"rope_parameters": rope})["rope_scaling"] == rope


def test_rope_by_layer_type_becomes_gemmas_two_bases():
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    types = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"]
    fixed = base.normalise({"rope_parameters": rope, "layer_types": types})
    assert (fixed["rope_theta"], fixed["rope_local_base_freq"]) == (1e6, 1e4)
    assert fixed["rope_scaling"]["factor"] == 8.0
    assert fixed["sliding_window_pattern"] == 4


def test_normalising_reads_nested_configs_and_removes_nothing():
    config = {"text_config": {"rope_parameters": {"rope_theta": 7.0}, "hidden_size": 8}}
    before = json.dumps(config)
    fixed = base.normalise(config)
    assert base.fingerprint(fixed) == {"rope_theta": 7.0, "hidden_size": 8}
    assert fixed["text_config"].items() >= config["text_config"].items()
    assert json.dumps(config) == before


def test_the_context_length_counts_rope_scaling():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    llama = {"factor": 32.0, "original_max_position_embeddings": 8192}
    for config, length in (
        ({"max_position_embeddings": 2048}, 2048),
        ({}, None),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": 32_768, "rope_scaling": yarn}, 131_072),
        ({"max_position_embeddings": 131_072, "rope_scaling": llama}, 131_072),
    ):
        assert base.context_length(config) == length


def test_the_digest_of_the_weights_changes_with_a_sampled_byte(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(1 << 20))
    before = base.weights_digest(tmp_path)
    assert base.weights_digest(tmp_path) == before
    (tmp_path / "b.safetensors").write_bytes(bytes((1 << 20) - 1) + b"x")
    assert base.weights_digest(tmp_path) != before


def test_blocks_are_filled_with_a_space_else_pad_else_eos():
    def tokenizer(space, pad=None, eos=None):
        encode = {" ": space}.get
        return SimpleNamespace(
            encode=lambda text, add_special_tokens: encode(text), pad_token_id=pad, eos_token_id=eos
        )

    for names, pad in ((([7, 8], 1, 2), 7), (([], 1, 2), 1), (([], None, 2), 2)):
        assert base.default_pad_token_id(tokenizer(*names)) == pad
    with pytest.raises(ModelError, match="no space, pad or eos"):
        base.default_pad_token_id(tokenizer([]))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"holds no config\.json"), ("{", "cannot be read"), ("[]", "cannot be read|names no"),
     ("{}", "names no model_type"), ('{"model_type": 3}', "names no model_type")],
)  # fmt: skip
def test_folders_that_hold_no_base_model_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        base.read_config(tmp_path)
