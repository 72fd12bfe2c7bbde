"""Blocks, virtual ids and their lifetimes; the embedding that reads them."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from kmerge_mlx.adapters.schema import EncoderConfig, LoRASpec, inner_size
from kmerge_mlx.encoder import MergeEncoder, split
from kmerge_mlx.errors import AdapterError, BlockTableFullError, PromptError
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.virtual_tokens import BlockTable, CompressedPrompt, MergedEmbedding

V, D = 50, 8


def embedding(k: int = 3, max_blocks: int = 100, context: int = 0) -> MergedEmbedding:
    mx.random.seed(1)
    encoder = MergeEncoder(EncoderConfig(k, D, 16, context))
    encoder.w3.weight = mx.random.normal(encoder.w3.weight.shape)
    return MergedEmbedding(nn.Embedding(V, D), encoder, pad_token_id=9, max_blocks=max_blocks)


def row_of(merged: MergedEmbedding, block: list[int]) -> mx.array:
    return merged.encoder(merged.embedding(mx.array([block])))[0]


@given(st.lists(st.integers(0, V - 1), max_size=40), st.integers(2, 6), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_each_block_is_led_by_the_tokens_before_it(ids, k, c):
    """The oracle looks every place up by itself: outside the segment there is padding."""
    blocks = split(ids, k, 9, c)
    assert len(blocks) == -(-len(ids) // k)
    for n, block in enumerate(blocks):
        places = range(n * k - c, n * k + k)
        assert block == tuple(ids[i] if 0 <= i < len(ids) else 9 for i in places)


def test_a_virtual_id_embeds_as_its_merged_block_and_blocks_never_straddle_segments():
    merged = embedding()
    prompt = merged.compress([Segment([1], False), Segment([2, 3, 4, 5]), Segment([6, 7], False)])
    assert (prompt.ids[0], prompt.ids[3:]) == (1, [6, 7])
    assert all(i >= V for i in prompt.ids[1:3])
    assert prompt.original_ids == [1, 2, 3, 4, 5, 6, 7]
    assert prompt.lengths == [1, 3, 1, 1, 1]
    assert prompt.compression_ratio == 7 / 5
    found = merged(mx.array(prompt.ids))
    assert mx.allclose(found[1], row_of(merged, [2, 3, 4]), atol=1e-6)
    assert mx.allclose(found[2], row_of(merged, [5, 9, 9]), atol=1e-6)
    ids = mx.array([[0, V - 1, 7]])
    assert mx.array_equal(merged(ids), merged.embedding(ids))


def test_the_encoder_runs_once_per_distinct_block(monkeypatch):
    merged, seen, run = embedding(), [], MergeEncoder.__call__

    def counted(encoder, embeddings):
        seen.append(len(embeddings))
        return run(encoder, embeddings)

    monkeypatch.setattr(MergeEncoder, "__call__", counted)
    ids = merged.compress([Segment([1, 2, 3, 1, 2, 3, 4])]).ids
    assert ids[0] == ids[1] != ids[2]
    merged.compress([Segment([4, 9, 9, 5, 6, 7])])
    assert seen == [2, 1]
    monkeypatch.setattr("kmerge_mlx.encoder.BLOCKS_PER_CHUNK", 5)
    new = merged.compress([Segment(range(11, 47))])
    assert seen == [2, 1, 5, 5, 2]
    wanted = [row_of(merged, list(range(start, start + 3))) for start in range(11, 47, 3)]
    assert mx.allclose(merged(mx.array(new.ids)), mx.stack(wanted), atol=1e-6)


def test_blocks_are_equal_only_if_their_context_is():
    merged = embedding(context=2)
    prompt = merged.compress([Segment([1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6])])
    assert prompt.ids[1] == prompt.ids[3]  # 2 3 | 4 5 6
    assert merged.compress([Segment([1, 2, 8, 4, 5, 6])]).ids[1] != prompt.ids[1]  # 2 8 | 4 5 6
    assert merged.compress([Segment([8, 2, 3, 4, 5, 6])]).ids[1] == prompt.ids[1]  # out of reach
    # What stands before a segment is not read: there is padding.
    lone = merged.compress([Segment([4, 5, 6])])
    assert lone.ids == merged.compress([Segment([1, 2, 3], False), Segment([4, 5, 6])]).ids[3:]
    found = merged(mx.array(lone.ids))[0]
    assert mx.allclose(found, row_of(merged, [9, 9, 4, 5, 6]), atol=1e-6)


def test_without_an_encoder_everything_is_read_as_it_is():
    merged = MergedEmbedding(nn.Embedding(V, D), None, 9)
    prompt = merged.compress([Segment([1, 2, 3, 4]), Segment([5], False)])
    assert prompt.ids == prompt.original_ids == [1, 2, 3, 4, 5]
    assert (merged.merge_factor, prompt.compression_ratio, len(merged.table)) == (1, 1.0, 0)
    for bad in (-1, V, V + 3):
        with pytest.raises(PromptError, match=f"token id {bad} is outside"):
            merged.compress([Segment([1, bad, 2])])


def test_forgotten_blocks_are_encoded_anew_and_their_prompts_are_foreign():
    merged = embedding()
    old = merged.compress([Segment([1, 2, 3])])
    before = merged(mx.array(old.ids))
    merged.encoder.w3.weight = 2 * merged.encoder.w3.weight
    merged.forget_blocks()
    new = merged.compress([Segment([1, 2, 3])])
    assert new.table is not old.table
    assert mx.allclose(merged(mx.array(new.ids))[0], row_of(merged, [1, 2, 3]), atol=1e-6)
    assert not mx.allclose(merged(mx.array(new.ids)), before, atol=1e-3)


# Lifetimes


def test_the_slots_of_dead_prompts_are_used_again():
    merged = embedding(max_blocks=2)
    for start in range(0, 40, 2):
        prompt = merged.compress([Segment([start, start, start, start + 1])])
        wanted = [row_of(merged, [start] * 3), row_of(merged, [start + 1, 9, 9])]
        assert mx.allclose(merged(mx.array(prompt.ids)), mx.stack(wanted), atol=1e-6)
        del prompt
    assert merged._rows.shape[0] == 2


def test_a_live_prompt_keeps_its_blocks_and_the_table_says_when_it_is_full():
    merged = embedding(max_blocks=2)
    held = merged.compress([Segment([1, 2, 3, 4, 5, 6])])
    before = merged(mx.array(held.ids))
    with pytest.raises(BlockTableFullError, match="1 new blocks, but 2 of 2 slots"):
        merged.compress([Segment([7, 8, 9])])
    assert mx.array_equal(merged(mx.array(held.ids)), before)
    assert merged.compress([Segment([4, 5, 6])]).ids == held.ids[1:]
    with pytest.raises(BlockTableFullError, match="max_blocks"):  # more than the table holds
        embedding(max_blocks=2).compress([Segment([1, 2, 3, 4, 5, 6, 7])])


def test_the_rest_of_a_cached_prompt_keeps_the_whole_alive():
    merged = embedding(max_blocks=2)
    prompt = merged.compress([Segment([1, 2, 3, 4, 5, 6])])
    rest = prompt.after(1)
    assert (rest.ids, rest.original_ids, rest.lengths) == (prompt.ids[1:], [4, 5, 6], [3])
    del prompt
    gc.collect()
    with pytest.raises(BlockTableFullError):
        merged.compress([Segment([7, 8, 9])])
    assert len(rest.ids) == 1


def test_an_interrupted_encoder_leaves_no_block_without_its_row(monkeypatch):
    merged = embedding()

    def interrupted(encoder, embeddings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MergeEncoder, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merged.compress([Segment([1, 2, 3])])
    assert len(merged.table) == 0
    prompt = merged.compress([Segment([1, 2, 3])])
    assert mx.allclose(merged(mx.array(prompt.ids))[0], row_of(merged, [1, 2, 3]), atol=1e-6)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_history_of_prompts_and_caches_ever_gives_a_block_the_wrong_slot(data):
    """Random prompts live and die, caches keep keys: each live id always means its own block."""
    table = BlockTable(V, capacity=6)
    cached: list[tuple[list[int], list[tuple[int, ...]]]] = []
    live: list[tuple[CompressedPrompt, list[tuple[int, ...]]]] = []
    table.cached_ids = lambda: [ids for ids, _ in cached]
    block_of: dict[int, tuple[int, ...]] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["prompt", "prompt", "drop", "cache", "evict"]))
        if action == "prompt":
            blocks = data.draw(st.lists(st.tuples(st.integers(0, 4), st.just(0)), max_size=4))
            try:
                ids, new = table.intern(blocks)
            except BlockTableFullError:
                named = {b for _, bs in [*live, *cached] for b in bs} | set(blocks)
                assert len(named) > 6
                continue
            block_of.update((V + slot, block) for slot, block in new.items())
            prompt = CompressedPrompt(ids, [], [])
            table.prompts.add(prompt)
            live.append((prompt, blocks))
            del prompt
        elif action == "drop" and live:
            live.pop(data.draw(st.integers(0, len(live) - 1)))
        elif action == "cache" and live:
            prompt, blocks = live[-1]
            cached.append((list(prompt.ids), blocks))
            del prompt
        elif action == "evict" and cached:
            cached.pop(0)
        for ids, blocks in [*((p.ids, b) for p, b in live), *cached]:
            assert [block_of[i] for i in ids] == list(blocks)


# The head


def test_head_lora_changes_the_output_side_alone():
    merged, x = embedding(), mx.random.normal((2, D))
    before = merged(mx.array([3]))
    assert mx.array_equal(merged.as_linear(x), merged.embedding.as_linear(x))
    merged.add_head_lora(LoRASpec(2, 1.5))
    merged.lora_b = mx.random.normal(merged.lora_b.shape)
    weight = np.array(merged.embedding.weight) + 1.5 * np.array(merged.lora_a @ merged.lora_b).T
    np.testing.assert_allclose(
        np.array(merged.as_linear(x)), np.array(x) @ weight.T, rtol=0, atol=1e-5
    )
    assert mx.array_equal(merged(mx.array([3])), before)
    # The rows are a cache, not parameters.
    names = {name.split(".")[0] for name, _ in tree_flatten(merged.parameters())}
    assert names == {"embedding", "encoder", "lora_a", "lora_b"}
    # Inputs are dropped in training alone.
    merged.head_dropout = nn.Dropout(0.5)
    assert not mx.array_equal(merged.as_linear(x), merged.as_linear(x))
    merged.eval()
    assert mx.array_equal(merged.as_linear(x), merged.as_linear(x))


# The encoder; its arithmetic is compared in test_parity.py and test_encoder_context.py


def filled(k: int, d: int, h: int, c: int = 0) -> MergeEncoder:
    mx.random.seed(k)
    encoder = MergeEncoder(EncoderConfig(k, d, h, c))
    encoder.update(tree_map(lambda a: mx.random.normal(a.shape, scale=0.2), encoder.parameters()))
    return encoder


def test_a_new_encoder_is_exactly_the_mean_of_the_block():
    for k, c in ((2, 0), (3, 0), (4, 3), (5, 1), (17, 0)):
        encoder = MergeEncoder(EncoderConfig(k, 16, inner_size(k, 16), c))
        read = mx.random.normal((7, c + k, 16))
        assert mx.array_equal(encoder(read), read[:, c:].mean(axis=1))


def test_the_encoder_computes_in_its_own_dtype():
    encoder = filled(2, 8, 16)
    assert encoder(mx.zeros((3, 2, 8), mx.bfloat16)).dtype == mx.float32
    encoder.set_dtype(mx.float16)
    assert encoder(mx.zeros((3, 2, 8), mx.float32)).dtype == mx.float16


def test_the_default_sizes_are_the_papers_up_to_4_and_impossible_ones_are_refused():
    # Millions of parameters at D = 896.
    counts = [EncoderConfig(k, 896, inner_size(k, 896)).num_parameters for k in (2, 3, 4)]
    assert [round(count / 1e6, 1) for count in counts] == [14.5, 31.3, 41.8]
    assert [inner_size(k, 10) for k in (5, 8, 49)] == [5, 5, 5]  # past the paper's
    assert [inner_size(8, 10, factor) for factor in (1.5, 0.25, 0.125)] == [120, 20, 10]
    assert [inner_size(8, 10, factor) for factor in (0.0625, 0.01)] == [5, 0]
    for sizes in (
        *((1, 8, 8), (2, 0, 8), (2, 8, -1), (2.0, 8, 8), (True, 8, 8)),
        *((2, 8, 8, -1), (2, 8, 8, 1.0), (2, 8, 8, None)),
    ):
        with pytest.raises(AdapterError, match="expected a whole number"):
            EncoderConfig(*sizes)
