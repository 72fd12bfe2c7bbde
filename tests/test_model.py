"""Loading: what fits, what is refused, and that the LoRA part is mlx-lm's own."""

from __future__ import annotations

import dataclasses
import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest

from kmerge_mlx import compress, load
from kmerge_mlx.adapters.folder import Adapter, save_adapter
from kmerge_mlx.adapters.schema import BaseModelConfig, LoRASpec, MergeConfig
from kmerge_mlx.adapters.tuning import LoRAConfig
from kmerge_mlx.base import fingerprint
from kmerge_mlx.errors import AdapterError, ModelError
from kmerge_mlx.model import attach, check_fit, merged_embedding
from tests.tiny import PAD, build, qwen2_config, random_adapter, write_base


def saved(adapter: Adapter, path):
    save_adapter(adapter, path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), qwen2_config())


@pytest.fixture(scope="module")
def adapter(base):
    return random_adapter(build(qwen2_config()), 4)


def test_a_loaded_model_is_mlx_lms_own_with_a_wrapped_embedding(base, adapter, tmp_path):
    model, tokenizer = load(str(base), saved(adapter, tmp_path / "a"))
    assert type(model).__module__ == "mlx_lm.models.qwen2"
    assert merged_embedding(model).merge_factor == 4
    assert merged_embedding(model).pad_token_id == PAD
    assert model.context_length == 32_768
    assert tokenizer.encode(" ")[0] == PAD


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_folder_of_the_same_base_takes_the_adapter(tmp_path, adapter, bits):
    """The encoder reads the dequantized table, and the logits drift by what mlx-lm's own do."""
    plain = write_base(tmp_path / "plain", qwen2_config())
    small = qwen2_config(quantization={"group_size": 32, "bits": bits})
    quantized = write_base(tmp_path / "quantized", small)
    recorded = BaseModelConfig("plain", fingerprint(qwen2_config()))
    known = dataclasses.replace(adapter, merge=dataclasses.replace(adapter.merge, base=recorded))
    path = saved(known, tmp_path / "a")
    prompt, logits = list(range(1, 40)), []
    for base in (plain, quantized):
        model, tokenizer = load(str(base), path)
        logits.append(model(mx.array([compress(model, tokenizer, prompt).ids])))
    assert isinstance(merged_embedding(model).embedding, nn.QuantizedEmbedding)
    drift = mx.abs(logits[0] - logits[1]).max().item() / mx.abs(logits[0]).max().item()
    assert drift < (0.5 if bits == 4 else 0.05)


def test_a_base_without_an_adapter_loads_plain(base):
    model, _ = load(str(base))
    assert merged_embedding(model) is None
    with pytest.raises(AdapterError, match="--k 4 needs a merge encoder: give --adapter-path"):
        load(str(base), k=4)


def test_the_lora_part_alone_is_what_mlx_lm_loads(base, tmp_path):
    headless = random_adapter(build(qwen2_config()), 4, head=False)
    path = saved(headless, tmp_path / "a")
    ours, _ = load(str(base), path)
    theirs, _ = mlx_lm.utils.load(str(base), adapter_path=str(path))
    ids = mx.array([[5, 6, 7, 8]])
    assert mx.array_equal(ours(ids), theirs(ids))


def test_lora_by_module_loads_with_its_own_ranks_and_scales(base, adapter, tmp_path):
    """The same LoRA in both forms gives the same logits."""
    names = sorted({name.rsplit(".", 1)[0] for name in adapter.tuning_weights})
    modules = {name: LoRASpec(4, 2.0) for name in names}
    other = Adapter(
        adapter.merge,
        LoRAConfig(2, modules=modules),
        adapter.tuning_weights,
        adapter.encoder_weights,
        adapter.head_weights,
    )
    ids = mx.array([[5, 6, 7, 8]])
    logits = [
        load(str(base), saved(a, tmp_path / n))[0](ids) for n, a in (("a", adapter), ("b", other))
    ]
    assert mx.array_equal(*logits)


def test_a_tied_and_an_untied_head_carry_the_same_lora(tmp_path):
    """An untied base whose head is a copy of its table is the tied base."""
    tied = build(qwen2_config())
    untied = build(qwen2_config(tie_word_embeddings=False))
    untied.update(tied.parameters())
    untied.lm_head.weight = tied.model.embed_tokens.weight
    adapter = random_adapter(tied, 4)
    ids = mx.array([[5, 6, 7, 8]])
    before = tied(ids)
    for model in (tied, untied):
        attach(model, adapter, PAD)
    assert mx.allclose(tied(ids), untied(ids), rtol=0, atol=1e-5)
    assert mx.abs(tied(ids) - before).max().item() > 0.1


def test_every_bad_lora_tensor_is_listed_with_both_shapes(adapter):
    weights = dict(adapter.tuning_weights)
    name, other = sorted(weights)[:2]
    del weights[name]
    weights[other] = mx.zeros((1, 2))
    weights["model.layers.9.mlp.up_proj.lora_a"] = mx.zeros((3, 4))
    broken = Adapter(
        adapter.merge, adapter.tuning, weights, adapter.encoder_weights, adapter.head_weights
    )
    with pytest.raises(AdapterError) as error:
        attach(build(qwen2_config()), broken, PAD)
    text = str(error.value)
    assert f"{name} is missing, expected shape" in text
    assert f"{other} has shape (1, 2), expected " in text
    assert "model.layers.9.mlp.up_proj.lora_a (3, 4) belongs to nothing here" in text


def test_lora_on_modules_the_base_lacks_is_refused(adapter):
    config = LoRAConfig(2, 0.0, LoRASpec(4, 2.0), ("self_attn.q_proj", "mlp.router"))
    broken = Adapter(adapter.merge, config, adapter.tuning_weights, adapter.encoder_weights)
    with pytest.raises(AdapterError, match=r"mlp\.router"):
        attach(build(qwen2_config()), broken, PAD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is 32, the adapter was made for 64"),
        ({"vocab_size": 900}, "vocab_size is 900"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5"),
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_a_base_that_differs_is_refused_by_name(base, adapter, change, message):
    recorded = BaseModelConfig("some/base", fingerprint(qwen2_config()))
    merge = MergeConfig(adapter.merge.encoder, recorded, PAD)
    known = Adapter(merge, adapter.tuning, {}, {})
    check_fit(known, qwen2_config(), "this")
    with pytest.raises(AdapterError, match=r"does not fit this \(it was made for some/base\)") as e:
        check_fit(known, qwen2_config(**change), "this")
    assert message in str(e.value)


def test_without_a_recorded_base_the_sizes_still_decide(adapter):
    with pytest.raises(AdapterError) as error:
        check_fit(adapter, qwen2_config(hidden_size=32, num_hidden_layers=1), "this")
    assert "hidden_size is 32, the encoder has 64" in str(error.value)
    assert "it has 1 layers, the LoRA covers 2" in str(error.value)


def test_a_head_for_another_vocabulary_is_refused(adapter):
    with pytest.raises(AdapterError, match=r"lora_b has shape \(4, 700\), expected \(4, 900\)"):
        attach(build(qwen2_config(vocab_size=900)), adapter, PAD)


def test_a_padding_token_outside_the_vocabulary_is_refused(adapter):
    with pytest.raises(AdapterError, match="pad_token_id 700 is outside"):
        attach(build(qwen2_config()), adapter, 700)


def test_integer_tensors_are_refused(adapter):
    weights = {name: a.astype(mx.int32) for name, a in adapter.encoder_weights.items()}
    broken = Adapter(adapter.merge, adapter.tuning, adapter.tuning_weights, weights)
    with pytest.raises(AdapterError, match="expected a floating-point dtype"):
        attach(build(qwen2_config()), broken, PAD)


@pytest.mark.parametrize("break_it", ["weights", "model_type", "tokenizer", "no weights"])
def test_a_base_that_cannot_be_loaded_is_one_line(base, tmp_path, break_it):
    folder = shutil.copytree(base, tmp_path / "base")
    if break_it == "weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif break_it == "no weights":
        (folder / "model.safetensors").unlink()
    elif break_it == "tokenizer":
        (folder / "tokenizer.json").write_text("{")
    else:
        config = json.dumps(qwen2_config(model_type="nosuch"))
        (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="cannot load") as error:
        load(str(folder))
    assert len(str(error.value).splitlines()) == 1


def test_bases_with_other_names_for_their_sizes_are_left_to_the_tensors(adapter):
    check_fit(adapter, {"model_type": "gpt2", "n_embd": 64, "n_layer": 2}, "this")


def test_a_folder_name_that_no_system_takes_is_one_line():
    with pytest.raises(ModelError, match=r"cannot read --model x+: File name too long"):
        load("x" * 300)
