"""What a model's graph multiplies and caches, against counts by hand from its config."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import load
from kmerge_mlx.errors import ModelError
from kmerge_mlx.tools import sizing
from kmerge_mlx.tools.sizing import SizingConfig, calculate
from kmerge_mlx.tools.tracing import Entry, trace
from tests.tiny import build, qwen2_config, write_base

D, INNER, HEADS, KV_HEADS, VOCAB = 64, 128, 4, 2, 700
KV = D * KV_HEADS // HEADS
LAYER = 2 * D * D + 2 * D * KV + 3 * D * INNER
ATTENTION = D  # scores: every head's width for each pair; as much for their weighted sum
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "head_dim": 16,
}

MAMBA = {
    "model_type": "mamba",
    "state_size": 4,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
}


def config(**changes):
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return qwen2_config(num_hidden_layers=3, **heads) | changes


@pytest.mark.parametrize("tied", [True, False])
def test_a_pass_is_counted_as_by_hand(tied):
    found = trace(build(config(tie_word_embeddings=tied)), "tiny")
    # Nobody asks for the last layer's output when only the KV cache is filled.
    assert found.prefill.linear == 2 * LAYER + 2 * D * KV
    assert found.last.linear == 3 * LAYER + D * VOCAB
    assert found.prefill.attention == (ATTENTION,) * 4
    assert found.last.attention == (ATTENTION,) * 6
    assert found.entries == (Entry(KV_HEADS, D // HEADS, D // HEADS, mx.float32),) * 3


def test_weights_are_read_once_and_embeddings_only_as_a_head():
    biases = D + 2 * KV
    found = trace(build(config(tie_word_embeddings=False)), "tiny")
    assert found.last.weight_bytes == 4 * (3 * (LAYER + biases) + D * VOCAB)
    assert found.prefill.weight_bytes == 4 * (2 * (LAYER + biases) + 2 * (D + 1) * KV)


def test_a_quantized_model_multiplies_as_much_and_reads_less(tmp_path):
    quantization = {"group_size": 32, "bits": 4}
    path = write_base(tmp_path, config(quantization=quantization, torch_dtype="float32"))
    plain = trace(build(config()), "tiny")
    model, _ = load(str(path))
    found = trace(model, "tiny")
    assert found.last.linear == plain.last.linear
    assert found.last.attention == plain.last.attention
    assert found.last.weight_bytes < plain.last.weight_bytes / 5


def test_only_the_experts_that_a_token_goes_to_are_counted():
    found = trace(build(config(**MOE)), "tiny")
    attention = 2 * D * D + 2 * D * KV
    layer = attention + D * 8 + 2 * 3 * D * 32
    assert found.last.linear == 3 * layer + D * VOCAB


def test_a_traced_model_is_what_it_was():
    model = build(config())
    before = dict(tree_flatten(model.parameters()))
    logits = model(mx.array([[1, 2, 3]]))
    trace(model, "tiny")
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert mx.array_equal(model(mx.array([[1, 2, 3]])), logits)


def test_a_model_that_caches_something_else_is_refused_by_name():
    with pytest.raises(ModelError, match="tiny keeps ArraysCache, not keys and values"):
        trace(build(config(**MAMBA)), "tiny")


def test_a_model_that_looks_at_values_is_refused():
    model = build(config())
    forward = type(model).__call__

    class Peeking(type(model)):
        def __call__(self, inputs, *rest, **named):
            return forward(self, inputs + inputs.max().item(), *rest, **named)

    model.__class__ = Peeking
    with pytest.raises(ModelError, match="tiny cannot be traced"):
        trace(model, "tiny")


def by_hand(positions: int, windows: list[int | None]) -> int:
    """All multiplications of a prefill, pair by pair."""
    total = 0
    for number, window in enumerate(windows):
        is_last_layer = number + 1 == len(windows)
        for query in range(positions):
            keys = min(query + 1, window or positions)
            if not is_last_layer or query == positions - 1:
                total += LAYER + 2 * ATTENTION * keys
            else:
                total += 2 * D * KV
    return total + D * VOCAB


def test_reading_a_prompt_is_counted_pair_by_pair(tmp_path):
    path = str(write_base(tmp_path, config()))
    encoder = 4 * D * (6 * D) * 2 + 4 * D * D  # K = 4: W1 and W2 of 6D x 4D, W3 of D x 4D
    one, four = calculate(path, SizingConfig((99,), (4,))).rows
    assert one.multiplications == by_hand(99, [None] * 3)
    assert four.multiplications == by_hand(25, [None] * 3) + 25 * encoder
    assert four.work_ratio == one.multiplications / four.multiplications


def test_a_window_is_where_attention_ends(tmp_path):
    gemma = {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16}
    window = {"sliding_window": 8, "sliding_window_pattern": 3}
    path = str(write_base(tmp_path, config(**gemma, **window)))
    one = calculate(path, SizingConfig((50,), (1,))).rows[0]
    assert one.multiplications == by_hand(50, [8, 8, None])


def test_the_floor_is_the_worst_balance_up_to_the_assumed_one():
    whole, merged = (1000, 10), (250, 12)
    limit = sizing.MULTIPLICATIONS_PER_BYTE

    def speedup(balance: float) -> float:
        """The least there can be on a machine of a known balance."""
        return max(whole[0], balance * whole[1]) / (merged[0] + balance * merged[1])

    worst = min(speedup(limit * i / 10_000) for i in range(10_001))
    assert sizing.floor(whole, merged) == pytest.approx(worst, rel=1e-3)
    assert sizing.floor((10**9, 10), (10**8, 12)) == 10**9 / (10**8 + limit * 12)
