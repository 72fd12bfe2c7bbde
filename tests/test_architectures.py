"""Base models of every architecture we claim: the logits they give, and virtual ids on them.

Oracles: Transformers' logits for the base; mlx-lm's own ``input_embeddings`` path for merging.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from kmerge_mlx import Segment, batch_generate, load
from kmerge_mlx.base import PROVEN, find_embedding
from kmerge_mlx.errors import ModelError
from kmerge_mlx.model import attach, merged_embedding
from tests.reference.make_checkpoints import ARCHITECTURES, expected_logits, make_base
from tests.tiny import PAD, build, qwen2_config, random_adapter

IDS = [299, 28, 223, 640, 201, 13, 602, 201, 259, 678, 201, 259, 44, 41, 201, 261, 56, 48]


FIRST, *REST = ARCHITECTURES


@pytest.fixture(
    scope="module",
    params=[FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)],
)
def base(request, tmp_path_factory):
    """A base model folder written by Transformers 5."""
    folder = tmp_path_factory.mktemp(request.param)
    make_base(folder, request.param)
    return folder


def merged(base, k=3):
    model, tokenizer = load(str(base))
    attach(model, random_adapter(model, k), PAD)
    return model, tokenizer


@pytest.mark.slow
def test_the_architectures_we_claim_are_the_ones_tested(tmp_path):
    tested = set()
    for name in ARCHITECTURES:
        make_base(tmp_path / name, name)
        tested.add(load(str(tmp_path / name))[0].model_type)
    assert tested == PROVEN


def test_base_logits_are_those_of_transformers(base):
    model, _ = load(str(base))
    logits = model(mx.array([IDS]))[0]
    wanted = mx.array(expected_logits(base, IDS).numpy())
    assert mx.abs(logits - wanted).max().item() < 2e-5


def test_virtual_ids_equal_the_input_embeddings_path(base):
    model, _ = merged(base)
    embedding = merged_embedding(model)
    prompt = embedding.compress([Segment(IDS[:13]), Segment(IDS[13:], merge=False)])
    assert max(prompt.ids) >= embedding.vocab_size
    rows = embedding(mx.array(prompt.ids))
    by_ids = list(generate_step(mx.array(prompt.ids), model, max_tokens=12))
    by_rows = generate_step(mx.array([], mx.int32), model, max_tokens=12, input_embeddings=rows)
    for (token, logprobs), (wanted, wanted_logprobs) in zip(by_ids, by_rows, strict=True):
        assert token == wanted
        assert mx.abs(logprobs - wanted_logprobs).max().item() < 1e-5


def test_a_batch_equals_its_prompts_one_by_one(base):
    model, tokenizer = merged(base)
    prompts = [IDS, IDS[:5], IDS[3:], IDS * 3]
    together = batch_generate(model, tokenizer, prompts, max_tokens=8, return_token_ids=True)
    for prompt, tokens in zip(prompts, together.token_ids, strict=True):
        alone = batch_generate(model, tokenizer, [prompt], max_tokens=8, return_token_ids=True)
        assert alone.token_ids == [tokens]


# Architectures that no oracle here covers go through the same path, and are probed at load.
OTHERS = {
    "olmo2": {"model_type": "olmo2", "max_position_embeddings": 512},
    "starcoder2": {"model_type": "starcoder2", "norm_epsilon": 1e-5},
    "cohere": {"model_type": "cohere", "logit_scale": 0.1},
    "phi3": {"model_type": "phi3", "rope_scaling": None, "pad_token_id": 0},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    | {"n_ctx": 128, "layer_norm_epsilon": 1e-5},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 32},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_read_virtual_ids_through_the_same_path(name):
    model = build(qwen2_config(**OTHERS[name]))
    assert model.model_type not in PROVEN
    attach(model, random_adapter(model, 3, keys=(), head=False), PAD)
    embedding = merged_embedding(model)
    # With W3 = 0 a block of one repeated token merges to that token's own embedding.
    embedding.encoder.w3.weight = mx.zeros_like(embedding.encoder.w3.weight)
    embedding.encoder.w3.bias = mx.zeros_like(embedding.encoder.w3.bias)
    prompt = embedding.compress([Segment([7, 7, 7]), Segment([9, 9, 9])])
    gap = mx.abs(model(mx.array([prompt.ids])) - model(mx.array([[7, 9]]))).max().item()
    assert gap < 1e-4


def test_a_head_that_bypasses_as_linear_is_refused_with_head_lora():
    model = build(qwen2_config(**OTHERS["seed_oss"]))
    with pytest.raises(ModelError, match="as_linear"):
        attach(model, random_adapter(model, 3, keys=()), PAD)


GEMMA4 = {"model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 2}
GEMMA4 |= {"intermediate_size": 64, "num_attention_heads": 2, "num_kv_shared_layers": 0}
GEMMA4 |= dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 700)
GEMMA4 |= {"hidden_size_per_layer_input": 16}


def test_models_that_embed_ids_a_second_time_are_refused_by_name():
    with pytest.raises(ModelError, match=r"gemma4 looks token ids up in 2 tables.*per_layer"):
        find_embedding(build(GEMMA4), "gemma4")


def test_a_model_that_peeks_at_ids_is_refused_by_the_probe(monkeypatch):
    model = build(qwen2_config())
    model.model_type = "peeking"
    plain = type(model).__call__
    peek = lambda m, ids: plain(m, ids) * (1 + ids[..., None] / 700)  # noqa: E731
    monkeypatch.setattr(type(model), "__call__", peek)
    with pytest.raises(ModelError, match="peeking looks at token ids outside"):
        attach(model, random_adapter(model, 3), PAD, name="peeking")
