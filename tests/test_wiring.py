"""Fresh adapters: wired, unfrozen, trained, gathered, saved, and read back bit for bit."""

from __future__ import annotations

import itertools

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from kmerge_mlx import Segment
from kmerge_mlx.adapters.folder import load_adapter, save_adapter
from kmerge_mlx.adapters.lora import default_keys
from kmerge_mlx.adapters.schema import EncoderConfig, FullConfig, LoRAConfig, LoRASpec, MergeConfig
from kmerge_mlx.encoder import split
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.model import adapter_of, attach, merged_embedding, unfreeze, wire
from tests.tiny import EXPERTS, PAD, PROJECTIONS, build, qwen2_config

D, V, LAYERS = 64, 700, 2
SPEC = LoRASpec(4, 2.0)
TUNINGS = {
    "uniform": LoRAConfig(LAYERS, 0.05, SPEC, PROJECTIONS),
    "last layer": LoRAConfig(1, 0.0, SPEC, PROJECTIONS),
    "by module": LoRAConfig(
        LAYERS,
        modules={
            "model.layers.0.self_attn.q_proj": SPEC,
            "model.layers.1.mlp.up_proj": LoRASpec(2, 0.5),
        },
    ),
    "full": FullConfig(1),
    "all full": FullConfig(-1),
}
ENCODERS = {1: None, 4: EncoderConfig(4, D, 2 * D), "4 with context": EncoderConfig(4, D, D, 3)}


def base(tied: bool = True, dtype=mx.float32, **changes) -> nn.Module:
    model = build(qwen2_config(tie_word_embeddings=tied, **changes))
    model.set_dtype(dtype)
    return model


def merge_of(k=4, head: bool = True) -> MergeConfig:
    return MergeConfig(ENCODERS[k], pad_token_id=PAD, head_lora=SPEC if head else None)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def train(model: nn.Module, merge: MergeConfig, steps: int = 2) -> None:
    """A few steps on made-up tokens, whose gradients flow through encoder, layers and head."""
    optimizer, merged = optim.Adam(0.01), merged_embedding(model)
    ids = mx.array([list(range(V, V + 6)) if merge.encoder else list(range(1, 7))])

    def loss(model: nn.Module) -> mx.array:
        if merge.encoder is None:
            return nn.losses.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).mean()
        k, c = merge.encoder.merge_factor, merge.encoder.context
        blocks = mx.array(split(list(range(1, 1 + 6 * k)), k, PAD, c))
        with merged.reading(merged.encoder(merged.embedding(blocks))):
            return nn.losses.cross_entropy(model(ids)[0], mx.arange(1, 7)).mean()

    gradients_of = nn.value_and_grad(model, loss)
    for _ in range(steps):
        _, gradients = gradients_of(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def logits_of(model: nn.Module) -> mx.array:
    prompt = merged_embedding(model).compress([Segment(list(range(1, 23))), Segment([5], False)])
    return model(mx.array([prompt.ids]))


@pytest.mark.parametrize("k", ENCODERS)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_was_trained_is_saved_and_attached_bit_for_bit(tmp_path, tuning, k):
    tuning = TUNINGS[tuning]
    for tied, head in ((True, True), (True, False), (False, True)):
        model, merge = base(tied), merge_of(k, head)
        wire(model, merge, tuning, PAD)
        unfreeze(model, tuning)
        before = logits_of(model)
        model.train()
        train(model, merge)
        merged_embedding(model).forget_blocks()
        save_adapter(adapter_of(model, merge, tuning), tmp_path / "a")
        model.eval()
        found = load_adapter(tmp_path / "a")
        fresh = base(tied)
        attach(fresh, found, PAD)
        assert mx.array_equal(logits_of(fresh), logits_of(model))
        unfreeze(fresh, tuning)  # a loaded adapter is where training may go on
        assert trainable(fresh) == trainable(model)
        assert not mx.array_equal(logits_of(model), before)
        assert (found.merge, found.tuning) == (merge, tuning)


@pytest.mark.parametrize("k", ENCODERS)
def test_a_fresh_adapter_reads_block_means_and_changes_nothing_else(k):
    for tied in (True, False):
        plain, model, ids = base(tied), base(tied), mx.array([[5, 6, 7, 8]])
        merged = wire(model, merge_of(k), TUNINGS["uniform"], PAD)
        assert mx.array_equal(plain(ids), model(ids))
        if k != 1:
            found = merged(mx.array(merged.compress([Segment([5, 6, 7, 8, 9])]).ids[:1]))
            rows = plain.model.embed_tokens(ids[0]).mean(axis=0)
            assert mx.abs(found - rows).max().item() < 1e-6


@pytest.mark.parametrize(("tied", "dtype"), [(True, mx.bfloat16), (False, mx.float16)])
def test_fresh_tensors_are_float32_and_the_model_keeps_its_dtype(tied, dtype):
    model, merge, tuning = base(tied, dtype), merge_of(), TUNINGS["uniform"]
    merged = wire(model, merge, tuning, PAD)
    adapter = adapter_of(model, merge, tuning)
    tensors = adapter.tuning_weights | adapter.encoder_weights | adapter.head_weights
    assert {array.dtype for array in tensors.values()} == {mx.float32}
    assert logits_of(model).dtype == dtype
    with merged.reading(mx.zeros((1, D), mx.float32)):
        assert merged(mx.array([V, 3])).dtype == dtype


# What is trainable


def expected_names(tied: bool, k, tuning: str, head: bool) -> set[str]:
    """Spelled out, not asked of the code."""
    parts = [f"w{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")]
    names = {f"model.embed_tokens.encoder.{part}" for part in parts if k != 1}
    modules = {
        "uniform": [f"model.layers.{i}.{key}" for i in (0, 1) for key in PROJECTIONS],
        "last layer": [f"model.layers.1.{key}" for key in PROJECTIONS],
        "by module": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
    }.get(tuning, [])
    if head:
        modules = [*modules, "model.embed_tokens" if tied else "lm_head"]
    names |= {f"{module}.{part}" for module in modules for part in ("lora_a", "lora_b")}
    layers = {"full": [1], "all full": [0, 1]}.get(tuning, [])
    inside = (
        *(f"self_attn.{p}_proj.{part}" for p in "qkv" for part in ("weight", "bias")),
        *("self_attn.o_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    )
    return names | {f"model.layers.{i}.{name}" for i in layers for name in inside}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_exactly_what_the_adapter_holds_is_trainable(tuning):
    for k, tied, head in itertools.product((1, 4), (True, False), (True, False)):
        model = base(tied)
        wire(model, merge_of(k, head), TUNINGS[tuning], PAD)
        unfreeze(model, TUNINGS[tuning])
        assert trainable(model) == expected_names(tied, k, tuning, head)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("k", [1, 4])
def test_a_quantized_base_stays_frozen_under_its_lora(tmp_path, k, tied):
    """QLoRA: 4-bit weights, LoRA and encoder on top, trained and read back bit for bit."""

    def quantized() -> nn.Module:
        model = base(tied)
        nn.quantize(model, group_size=32, bits=4)
        return model

    model, merge, tuning = quantized(), merge_of(k), TUNINGS["uniform"]
    wire(model, merge, tuning, PAD)
    unfreeze(model, tuning)
    assert trainable(model) == expected_names(tied, k, "uniform", True)
    model.train()
    train(model, merge)
    model.eval()
    save_adapter(adapter_of(model, merge, tuning), tmp_path / "a")
    fresh = quantized()
    attach(fresh, load_adapter(tmp_path / "a"), PAD)
    assert mx.array_equal(logits_of(fresh), logits_of(model))


def test_a_warm_up_trains_the_encoder_alone_and_can_be_ended():
    model, tuning = base(), "all full"
    wire(model, merge_of(), TUNINGS[tuning], PAD)
    unfreeze(model, TUNINGS[tuning], encoder_only=True)
    assert trainable(model) == {n for n in expected_names(True, 4, tuning, True) if "encoder" in n}
    unfreeze(model, TUNINGS[tuning])
    assert trainable(model) == expected_names(True, 4, tuning, True)
    model = base()
    wire(model, merge_of(1), TUNINGS["uniform"], PAD)
    with pytest.raises(AdapterError, match="merge factor 1 has no encoder to train alone"):
        unfreeze(model, TUNINGS["uniform"], encoder_only=True)


# Which modules carry LoRA when nobody says


CONFIGS = {
    "qwen2": qwen2_config(),
    "experts": qwen2_config(**EXPERTS),
    "first layer dense": qwen2_config(**EXPERTS | {"mlp_only_layers": [0]}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_default_keys_are_mlx_lms_own_choice(name):
    for num_layers, covered in ((-1, LAYERS), (2, 2), (1, 1)):
        theirs, ours = build(CONFIGS[name]), build(CONFIGS[name])
        linear_to_lora_layers(theirs, num_layers, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        keys = default_keys(ours, num_layers)
        wire(ours, merge_of(1, head=False), LoRAConfig(covered, 0.0, SPEC, keys), PAD)
        lora = {n for n, _ in tree_flatten(theirs.parameters()) if n.endswith(("lora_a", "lora_b"))}
        assert lora == set(adapter_of(ours, merge_of(1, head=False), LoRAConfig(2)).tuning_weights)
        assert lora


# Refusals


def test_lora_of_a_models_own_kind_is_refused_by_name():
    config = {"model_type": "afm7", "vocab_size": V, "hidden_dim": 32, "num_layers": 2}
    config |= {"num_kv_reuse_layers": 1, "num_heads": 2, "num_kv_heads": 2}
    keys = default_keys(build(config))
    assert "self_attn.out_proj" in keys
    assert "self_attn.qkv_proj" not in keys
    with pytest.raises(AdapterError, match="qkv_proj as a plain linear layer"):
        wire(build(config), merge_of(1), LoRAConfig(1, 0.0, SPEC, ("self_attn.qkv_proj",)), PAD)


def test_an_encoder_for_another_width_is_refused():
    merge = MergeConfig(EncoderConfig(4, 32, 64))
    with pytest.raises(AdapterError, match="tiny has hidden_size 64, the encoder has 32"):
        wire(base(), merge, TUNINGS["uniform"], PAD, "tiny")
