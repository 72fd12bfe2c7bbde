"""The training forward pass: the same loss and gradients as the naive way, from fewer logits."""

from __future__ import annotations

import random

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.model import attach, merged_embedding
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.train.loss import answer_logits, answer_loss
from kmerge_mlx.train.rows import bucket, make_batch
from tests.tiny import PAD, build, qwen2_config, random_adapter

V = 700


def examples(count: int = 5, seed: int = 0) -> list[TokenizedExample]:
    rng = random.Random(seed)
    draw = lambda n: [rng.randrange(1, V) for _ in range(n)]  # noqa: E731
    return [
        TokenizedExample(
            [Segment(draw(rng.randint(1, 30))), Segment(draw(rng.randint(1, 4)), merge=False)],
            [*draw(rng.randint(1, 6)), 0],
        )
        for _ in range(count)
    ]


def model_of(tied: bool, k: int = 3, context: int = 0) -> nn.Module:
    model = build(qwen2_config(tie_word_embeddings=tied))
    attach(model, random_adapter(model, k, context=context), PAD)
    model.train()
    return model


def naive_loss(model: nn.Module, rows: list[TokenizedExample]) -> mx.array:
    """One example at a time, unpadded, through the embeddings, with logits everywhere."""
    merged, total = merged_embedding(model), mx.array(0.0)
    for example in rows:
        parts = []
        for segment in example.segments:
            ids = list(segment.ids)
            if segment.merge:
                for start in range(0, len(ids), merged.merge_factor):
                    places = range(start - merged.context, start + merged.merge_factor)
                    read = [ids[i] if 0 <= i < len(ids) else PAD for i in places]
                    parts.append(merged.encoder(merged.embedding(mx.array([read]))))
            else:
                parts.append(merged.embedding(mx.array(ids)))
        prompt = mx.concatenate(parts)
        answer = merged.embedding(mx.array(example.answer_ids[:-1], mx.int32))
        embeddings = mx.concatenate([prompt, answer])[None]
        logits = model(mx.zeros((1, embeddings.shape[1]), mx.int32), input_embeddings=embeddings)
        logits = logits[0, prompt.shape[0] - 1 :]
        total += nn.losses.cross_entropy(logits, mx.array(example.answer_ids)).sum()
    return total


@pytest.mark.parametrize(("tied", "context"), [(True, 0), (True, 2), (False, 5)])
def test_loss_and_gradients_are_those_of_the_naive_way(tied, context):
    model, rows = model_of(tied, context=context), examples()
    batch = make_batch(rows, 3, PAD, V, context)
    assert batch.blocks.shape[1] == context + 3
    assert answer_logits(model, batch).shape == (batch.targets.size, V)
    assert batch.targets.size < batch.ids.size / 2  # logits exist at answer positions alone
    wanted, wanted_gradients = nn.value_and_grad(model, naive_loss)(model, rows)
    (loss, tokens), gradients = nn.value_and_grad(model, answer_loss)(model, batch)
    assert tokens.item() == sum(len(example.answer_ids) for example in rows)
    assert abs(loss.item() - wanted.item()) < 1e-4 * wanted.item()
    found = dict(tree_flatten(gradients))
    for name, gradient in tree_flatten(wanted_gradients):
        assert mx.abs(gradient - found[name]).max().item() < 1e-3, name
    for part in ("encoder.w1.weight", "encoder.w3.weight"):
        assert mx.abs(found[f"model.embed_tokens.{part}"]).max().item() > 1e-3


def test_a_model_answers_as_before_once_a_loss_was_computed():
    model, plain = model_of(True), model_of(True)
    answer_loss(model, make_batch(examples(), 3, PAD, V))
    prompt = merged_embedding(model).compress([Segment([1, 2, 3, 4])])
    same = merged_embedding(plain).compress([Segment([1, 2, 3, 4])])
    assert prompt.ids == same.ids
    assert mx.array_equal(model(mx.array([prompt.ids])), plain(mx.array([same.ids])))


def test_a_tied_model_trains_without_merging_too():
    """K = 1: the embedding is wrapped for the head's sake, and there is no encoder."""
    model, rows = model_of(True, k=1), examples()
    wanted = mx.array(0.0)
    for example in rows:
        ids = [*example.prompt_ids, *example.answer_ids]
        logits = model(mx.array([ids[:-1]]))[0, len(example.prompt_ids) - 1 :]
        wanted += nn.losses.cross_entropy(logits, mx.array(example.answer_ids)).sum()
    loss, _ = answer_loss(model, make_batch(rows, 1, PAD, V))
    assert abs(loss.item() - wanted.item()) < 1e-4 * wanted.item()


def test_equal_blocks_of_a_batch_are_merged_once():
    twice = [TokenizedExample([Segment([1, 2, 3, 4, 5, 6])], [9, 0])] * 2
    batch = make_batch(twice, 3, PAD, V)
    assert batch.ids[0].tolist() == batch.ids[1].tolist()
    assert batch.ids[0, :3].tolist() == [V, V + 1, 9]
    assert batch.blocks[:2].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_bucket_sizes_are_few_and_never_too_small():
    sizes = sorted({bucket(n) for n in range(1, 1000)})
    assert sizes == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(n <= bucket(n) <= max(8, 1.5 * n) for n in range(1, 5000))
    assert bucket(0) == 0
