"""What a base model's config says, and how it is found."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from kmerge_mlx import base
from kmerge_mlx.errors import ModelError
from tests.conftest import UPSTREAM
from tests.tiny import qwen2_config


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


def test_the_digest_of_a_base_changes_with_every_byte_and_with_its_config(tmp_path):
    """The older one, of samples, is still known, and sees less."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    weights, size = tmp_path / "model.safetensors", 16 << 20
    weights.write_bytes(bytes(size))
    first, sampled = base.digests(tmp_path)
    assert base.digests(tmp_path) == (first, sampled)
    seen = set()
    for at in (0, 200_000, (8 << 20) - 1, 8 << 20, size - 1):
        content = bytearray(size)
        content[at] = 1
        weights.write_bytes(content)
        seen.add(base.digests(tmp_path)[0])
        assert at != 200_000 or base.digests(tmp_path)[1] == sampled
    weights.write_bytes(bytes(size))
    for change in ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_theta": 5e5}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | change))
        seen.add(base.digests(tmp_path)[0])
    assert len(seen - {first}) == 7
    (tmp_path / "config.json").write_text('{ "model_type":"qwen2" }')
    assert base.digests(tmp_path) == (first, sampled)


def test_a_base_without_its_tokenizers_file_is_refused_but_not_one_with_other_files(tmp_path):
    """transformers makes a tokenizer of no token but its special ones then."""
    about = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    config = {"model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for kind in ("Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer", "GemmaTokenizer"):
        named = json.dumps(about | {"tokenizer_class": kind})
        (tmp_path / "tokenizer_config.json").write_text(named)
        with pytest.raises(ModelError, match=r"lacks tokenizer\.json|cannot load it") as caught:
            base.read_tokenizer(tmp_path, config, "it")
        assert "\n" not in str(caught.value)
    model = json.loads((UPSTREAM / "base" / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    assert base.read_tokenizer(tmp_path, config, "it").decode([model["vocab"]["A"]]) == "A"


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
     ("{}", "names no model_type"), ('{"model_type": 3}', "names no model_type"),
     ('{"model_type": "qwen2", "num_hidden_layers": 1000000}', "expected up to 1024"),
     ('{"model_type": "x", "text_config": {"num_layers": 1000000}}', "expected up to 1024"),
     ('{"model_type": "x", "layer_types": ' + "[" * 99_999, "cannot be read"),
     (" " * (5 << 20), "expected at most 4,194,304")],
)  # fmt: skip
def test_folders_that_hold_no_base_model_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        base.read_config(tmp_path)


@pytest.mark.parametrize("name", base.SIZES)
def test_a_size_that_no_model_has_is_refused_by_name(tmp_path, name):
    config, file = qwen2_config(), tmp_path / "config.json"
    for value, shown in ((0, "0"), (-1, "-1"), ("x", "'x'"), (2.5, "2.5"), (True, "True")):
        file.write_text(json.dumps(config | {name: value}))
        with pytest.raises(ModelError) as caught:
            base.read_config(tmp_path)
        assert str(caught.value) == f"{file}: {name} is {shown}, expected a whole number above 0"
    for value in (None, [2, 4], config[name]):  # some models have a size for each layer
        file.write_text(json.dumps({"model_type": "x", "text_config": config | {name: value}}))
        assert base.read_config(tmp_path)


READ = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "model.safetensors",
    "merges.txt",
)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["pipe", "zero"])
def test_what_may_never_end_is_not_read(tmp_path, name, kind):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=f"cannot read .*{name}: it is not a file"):
        base.read_config(tmp_path)


def test_a_tokenizer_without_end_is_refused_at_once(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", 1 << 40)
    with pytest.raises(ModelError, match=r"tokenizer\.json holds 1,099,511,627,776 bytes"):
        base.read_config(tmp_path)
