"""Loading: what fits, what is refused, and that the LoRA part is mlx-lm's own."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from mlx_lm.generate import generate_step

from kmerge_mlx import Segment, compress, generate, load, stream_generate
from kmerge_mlx.adapters.folder import Adapter, load_adapter, save_adapter
from kmerge_mlx.adapters.schema import BaseModelConfig, LoRAConfig, LoRASpec
from kmerge_mlx.base import fingerprint
from kmerge_mlx.errors import AdapterError, ModelError
from kmerge_mlx.model import attach, check_fit, merged_embedding
from tests.saved_adapters import refused
from tests.tiny import PAD, build, prompts_of, qwen2_config, random_adapter, write_base


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
    known = replace(adapter, merge=replace(adapter.merge, base=recorded))
    path = saved(known, tmp_path / "a")
    prompt, logits = list(range(1, 40)), []
    for base in (plain, quantized):
        model, tokenizer = load(str(base), path)
        logits.append(model(mx.array([compress(model, tokenizer, prompt).ids])))
    assert isinstance(merged_embedding(model).embedding, nn.QuantizedEmbedding)
    drift = mx.abs(logits[0] - logits[1]).max().item() / mx.abs(logits[0]).max().item()
    assert drift < (0.5 if bits == 4 else 0.05)


@pytest.mark.parametrize("kind", ["bundled", "converted", "quantized"])
def test_a_model_that_one_thread_loaded_generates_in_another(
    tmp_path, base_path, adapter_path, adapter, kind
):
    """Nothing is left to compute, which MLX would ask the ended thread's stream for on a GPU."""
    if kind == "quantized":
        packed = qwen2_config(quantization={"group_size": 32, "bits": 4})
        names = (str(write_base(tmp_path / "base", packed)), saved(adapter, tmp_path / "a"))
    else:
        names = ("bundled",) * 2 if kind == "bundled" else (str(base_path), adapter_path)
    with ThreadPoolExecutor(1) as other:
        model, tokenizer = other.submit(load, *names, 4).result()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.state)
    assert max(mx.get_peak_memory(), mx.get_active_memory()) <= held
    prompt = [Segment(prompts_of(1, 40, 40)[0] if kind != "bundled" else [5, 6, 7, 8])]
    here = load(*names, 4)
    assert generate(model, tokenizer, prompt, max_tokens=4) == generate(*here, prompt, max_tokens=4)


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
    head = adapter.head_weights | {"lora_b": mx.zeros((4, 900))}
    broken = replace(adapter, tuning_weights=weights, head_weights=head)
    with pytest.raises(AdapterError, match="does not fit the base model: 4 problems") as error:
        attach(build(qwen2_config()), broken, PAD)
    text = str(error.value)
    assert f"{name} is missing, expected shape" in text
    assert f"{other} has shape (1, 2), expected " in text
    assert "model.layers.9.mlp.up_proj.lora_a (3, 4) belongs to nothing here" in text
    assert "lm_head.lora_b has shape (4, 900), expected (4, 700)" in text


def test_a_base_that_differs_is_refused_by_name(adapter):
    recorded = BaseModelConfig("some/base", fingerprint(qwen2_config()))
    known = replace(adapter, merge=replace(adapter.merge, base=recorded))
    check_fit(known, qwen2_config(), "this")
    check_fit(adapter, {"model_type": "gpt2", "n_embd": 64}, "this")  # left to the tensors
    for change, message in (
        ({"hidden_size": 32}, "hidden_size is 32, the adapter was made for 64"),
        ({"vocab_size": 900}, "vocab_size is 900"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5"),
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ):
        with pytest.raises(AdapterError, match=r"not fit this \(it was made for some/base\)") as e:
            check_fit(known, qwen2_config(**change), "this")
        assert message in str(e.value)


def test_what_a_base_does_not_have_is_refused(adapter):
    config = LoRAConfig(2, 0.0, LoRASpec(4, 2.0), ("self_attn.q_proj", "mlp.router"))
    with pytest.raises(AdapterError, match=r"mlp\.router"):
        attach(build(qwen2_config()), replace(adapter, tuning=config), PAD)
    with pytest.raises(AdapterError, match="pad_token_id 700 is outside"):
        attach(build(qwen2_config()), adapter, 700)


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


# ---- K = 1: an adapter that merges nothing, the baseline of every comparison ----


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory):
    """Two K = 1 adapters for the base: with a LoRA of the head, and without."""
    root, model = tmp_path_factory.mktemp("unmerged"), build(qwen2_config())
    save_adapter(random_adapter(model, 1), root / "head")
    save_adapter(random_adapter(model, 1, head=False), root / "headless")
    return root


def test_a_headless_k1_adapter_is_mlx_lms_own(base, unmerged):
    model, tokenizer = load(str(base), unmerged / "headless", 1)
    theirs, _ = mlx_lm.utils.load(str(base), adapter_path=str(unmerged / "headless"))
    ids = prompts_of(1, 40, 40)[0]
    prompt = compress(model, tokenizer, [Segment(ids[:30]), Segment(ids[30:], False)])
    assert prompt.ids == prompt.original_ids == ids
    found = stream_generate(model, tokenizer, ids, max_tokens=8)
    wanted = generate_step(mx.array(ids), theirs, max_tokens=8)
    for response, (token, logprobs) in zip(found, wanted, strict=True):
        assert response.token == token
        assert mx.allclose(response.logprobs, logprobs, atol=1e-4)
        assert (response.prompt_tokens, response.compressed_tokens) == (40, 40)


def test_tensors_that_do_not_belong_to_a_k1_adapter_are_refused(unmerged, tmp_path):
    adapter = load_adapter(unmerged / "head", 1)
    stray = replace(adapter, encoder_weights={"w1.bias": mx.zeros((5,))})
    save_adapter(stray, tmp_path / "a")
    assert "encoder.w1.bias (5,) belongs to nothing here" in refused(tmp_path / "a")
    for shape in ((), (64,), (64, 3), (64, 4, 1)):
        head = adapter.head_weights | {"lora_a": mx.zeros(shape)}
        save_adapter(replace(adapter, head_weights=head), tmp_path / "a")
        assert f"lm_head.lora_a has shape {shape}, expected (" in refused(tmp_path / "a")
    head = adapter.head_weights | {"lora_a": mx.zeros((32, 4))}  # its width is the base's to know
    with pytest.raises(AdapterError, match=r"lora_a has shape \(32, 4\), expected \(64, 4\)"):
        attach(build(qwen2_config()), replace(adapter, head_weights=head), PAD)
