"""Encoder warm-up: the encoder alone moves, by the answers or by telling its own tokens."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.model import merged_embedding
from kmerge_mlx.train.loss import add_decoder, reconstruction_loss
from kmerge_mlx.train.rows import make_batch, with_candidates
from tests.train.test_loss import PAD, V, examples, model_of
from tests.train_runs import (
    NO_DROPOUT,
    SMALL_TREES,
    log_of,
    same,
    tensors_of,
    train,
    trained,
    write_data,
)

K = 3
OFTEN = ("--steps-per-report", 1, "--val-batches", 0)


def part(tensors: dict[str, mx.array], name: str) -> dict[str, mx.array]:
    return {n: array for n, array in tensors.items() if n.startswith(name)}


@pytest.mark.parametrize("loss", ["answer", "reconstruction"])
def test_only_the_encoder_moves_while_it_warms_up_and_no_adapter_holds_its_decoder(tmp_path, loss):
    warm = ("--encoder-warmup", 3, "--encoder-warmup-loss", loss, *OFTEN)
    path, decoder = tmp_path / "run", {"decoder.weight", "decoder.bias"}
    trained(path, *SMALL_TREES, *warm, "--iters", 1)
    one, state = tensors_of(path), mx.load(str(path / "training" / "state.safetensors"))
    kept = {n for n in state if n.startswith("decoder")}
    assert kept == (decoder if loss == "reconstruction" else set())
    trained(path, *SMALL_TREES, *warm, "--iters", 3, "--resume")
    three = tensors_of(path)
    for name in ("tuning.", "head."):
        assert part(one, name)
        assert same(part(one, name), part(three, name))
    assert all(not a.any().item() for n, a in three.items() if n.endswith("lora_b"))
    moved = [n for n, a in part(one, "encoder").items() if mx.abs(a - three[n]).max().item() > 1e-4]
    assert len(moved) == len(part(one, "encoder"))
    state = mx.load(str(path / "training" / "state.safetensors"))
    assert not [name for name in (*state, *three) if "decoder" in name]


def test_a_group_of_batches_ends_with_the_warm_up(tmp_path):
    """Gradients of one loss are never added to those of the other."""
    warm = ("--encoder-warmup", 4, "--grad-accumulation-steps", 3, *OFTEN)
    trained(tmp_path / "run", *SMALL_TREES, *warm, "--iters", 9, yaml=NO_DROPOUT)
    assert [i for i, _ in log_of(tmp_path / "run", "train_loss")] == [3, 4, 7, 9]


def test_the_reconstruction_loss_is_that_of_numpy():
    """Every block of the batch, its K tokens, a softmax over the batch's distinct tokens."""
    rows, model = examples(5), model_of(True)
    merged = merged_embedding(model)
    add_decoder(merged)
    batch = with_candidates(make_batch(rows, K, PAD, V), K)
    total, tokens = reconstruction_loss(model, batch)
    blocks = set()
    for row in rows:
        for segment in row.segments:
            ids = list(segment.ids) + [PAD] * (-len(segment.ids) % K)
            starts = range(0, len(ids), K) if segment.merge else ()
            blocks |= {tuple(ids[start : start + K]) for start in starts}
    candidates = sorted({i for block in blocks for i in block})
    table = np.array(merged.embedding(mx.array(candidates)), np.float64)
    weight, bias = (np.array(merged.decoder[n], np.float64) for n in ("weight", "bias"))
    wanted = 0.0
    for block in blocks:
        vector = np.array(merged.encoder(merged.embedding(mx.array([block]))), np.float64)[0]
        decoded = (weight @ vector + bias).reshape(K, -1)
        scores = decoded @ table.T
        logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        wanted -= sum(logs[i, candidates.index(block[i])] for i in range(K))
    assert tokens.item() == K * len(blocks)
    assert total.item() == pytest.approx(wanted, rel=1e-4)


def test_with_a_context_only_the_blocks_own_tokens_are_told():
    batch = with_candidates(make_batch(examples(5), K, PAD, V, context=2), K)
    targets = np.array(batch.candidates)[np.array(batch.block_targets)]
    own = np.array(batch.blocks)[:, 2:]
    assert (targets[: batch.num_blocks] == own[: batch.num_blocks]).all()


def test_rows_that_merge_nothing_leave_every_weight_a_number(tmp_path):
    """No block: nothing to reconstruct."""
    row = {"context": "", "prompt": "Tree: AB", "completion": "AB"}
    data = write_data(tmp_path / "data", [row] * 8)
    warm = ("--encoder-warmup", 2, "--encoder-warmup-loss", "reconstruction", *OFTEN)
    result = train(tmp_path / "run", "--data", data, *warm, "--iters", 3)
    assert result.code == 0, result.err
