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
LOSSES = ("answer", "reconstruction")
OFTEN = ("--steps-per-report", 1, "--val-batches", 0)


def part(tensors: dict[str, mx.array], name: str) -> dict[str, mx.array]:
    return {n: array for n, array in tensors.items() if n.startswith(name)}


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_encoder_moves_while_it_warms_up(tmp_path, loss):
    warm = ("--encoder-warmup", 6, "--encoder-warmup-loss", loss, *OFTEN)
    trained(tmp_path / "one", *SMALL_TREES, *warm, "--iters", 1)
    trained(tmp_path / "six", *SMALL_TREES, *warm, "--iters", 6)
    one, six = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "six")
    for name in ("tuning.", "head."):
        assert part(one, name)
        assert same(part(one, name), part(six, name))
    assert all(not a.any().item() for n, a in six.items() if n.endswith("lora_b"))
    moved = [n for n, a in part(one, "encoder").items() if mx.abs(a - six[n]).max().item() > 1e-4]
    assert len(moved) == len(part(one, "encoder"))


def test_the_decoder_is_saved_with_the_run_and_never_with_the_adapter(tmp_path):
    warm = ("--encoder-warmup", 4, "--encoder-warmup-loss", "reconstruction", *OFTEN)
    path = tmp_path / "run"
    trained(path, *SMALL_TREES, *warm, "--iters", 2)
    state = mx.load(str(path / "training" / "state.safetensors"))
    assert {n for n in state if n.startswith("decoder.")} == {"decoder.weight", "decoder.bias"}
    assert not [name for name in tensors_of(path) if "decoder" in name]
    trained(path, *SMALL_TREES, *warm, "--iters", 6, "--resume")
    state = mx.load(str(path / "training" / "state.safetensors"))
    assert not [name for name in state if "decoder" in name]


def test_a_group_of_batches_ends_with_the_warm_up(tmp_path):
    """Gradients of one loss are never added to those of the other."""
    warm = ("--encoder-warmup", 4, "--grad-accumulation-steps", 3, *OFTEN)
    trained(tmp_path / "run", *SMALL_TREES, *warm, "--iters", 9, yaml=NO_DROPOUT)
    assert [i for i, _ in log_of(tmp_path / "run", "train_loss")] == [3, 4, 7, 9]


def reconstruction(rows):
    """A model with a decoder, a batch, and the mean loss of a block's token."""
    model = model_of(True)
    mx.random.seed(1)
    add_decoder(merged_embedding(model))
    batch = with_candidates(make_batch(rows, K, PAD, V), K)
    return model, batch, reconstruction_loss(model, batch)


def test_the_reconstruction_loss_is_that_of_numpy():
    """Every block of the batch, its K tokens, a softmax over the batch's distinct tokens."""
    rows = examples(5)
    model, _, (total, tokens) = reconstruction(rows)
    merged = merged_embedding(model)
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
