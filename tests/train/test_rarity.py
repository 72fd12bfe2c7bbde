"""The start `information`: the term itself, what is fitted for it, and runs that begin with it."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx import load
from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.adapters.schema import INFORMATION, EncoderConfig
from kmerge_mlx.encoder import EXPONENT, MergeEncoder
from kmerge_mlx.evaluation.baselines import Mean
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.train.prepare import prepare
from kmerge_mlx.train.settings import TrainSettings
from tests.cli_runner import assert_one_error, run
from tests.train_runs import BASE, SMALL_TREES, train, trained

START = ("--encoder-start", INFORMATION)
SCHEDULE = "lr_schedule: {name: linear_schedule, arguments: [1e-3, 1e-3, 99]}\n"


def test_the_term_is_that_of_numpy_and_is_as_long_as_a_token():
    mx.random.seed(1)
    encoder = MergeEncoder(EncoderConfig(3, 8, 16, 2, start=INFORMATION))
    encoder.update({n: mx.random.normal((8,)) for n in ("center", "gate_weight")})
    encoder.gate_bias = mx.array([4.0])
    x = mx.random.normal((5, 5, 8))
    own, center, gate = (
        np.array(a, np.float64) for a in (x[:, 2:], encoder.center, encoder.gate_weight)
    )
    for found, block in zip(np.array(encoder(x)), own, strict=True):
        apart = block - center
        lengths = np.linalg.norm(apart, axis=1)
        weights = np.clip(block @ gate + 4, 1, 14) ** EXPONENT
        direction = (weights[:, None] * apart / lengths[:, None]).sum(axis=0)
        length = (weights * lengths).sum() / weights.sum()
        wanted = center + direction / np.linalg.norm(direction) * length
        assert found == pytest.approx(wanted, abs=1e-4)
        assert lengths.min() <= np.linalg.norm(found - center) + 1e-4 <= lengths.max() + 2e-4


def test_the_mlp_reads_directions_and_gives_a_share_of_a_tokens_length():
    """Scaled around its center, a table gives the same, scaled: no rate depends on its size."""
    mx.random.seed(2)
    encoder = MergeEncoder(EncoderConfig(3, 8, 16, 2, start=INFORMATION))
    encoder.update({"center": mx.random.normal((8,)), "gate_bias": mx.array([4.0])})
    x = mx.random.normal((5, 5, 8))
    start = encoder(x)
    encoder.w3.weight = mx.random.normal(encoder.w3.weight.shape)
    found, center = encoder(x), encoder.center
    assert not mx.allclose(found, start, atol=1e-2).item()
    assert mx.allclose(encoder(center + 9 * (x - center)) - center, 9 * (found - center), atol=1e-3)
    hidden = (x - center) / mx.linalg.norm(x - center, axis=-1, keepdims=True) * 8**0.5
    for layer in (encoder.w1, encoder.w2):
        hidden = mx.maximum(layer(hidden.reshape(5, -1)), 0)
    share = mx.linalg.norm(start - center, axis=-1, keepdims=True) / 8**0.5
    assert mx.allclose(found - start, share * encoder.w3(hidden), atol=1e-4).item()


def test_a_block_of_equal_tokens_is_that_token():
    encoder = MergeEncoder(EncoderConfig(4, 8, 16, start=INFORMATION))
    token = mx.random.normal((1, 1, 8))
    assert mx.allclose(encoder(mx.repeat(token, 4, axis=1)), token[:, 0], atol=1e-5).item()


def test_frequent_tokens_weigh_less_than_rare_ones(tmp_path):
    """Oracle: NumPy's least squares, of the token counts of the data."""
    rows = [{"prompt": "A A A A A A B", "completion": "x"}] * 8
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "data": str(tmp_path),
        "encoder_start": INFORMATION,
        "adapter_path": str(tmp_path / "a"),
    }
    run_ = prepare(TrainSettings(model=str(BASE), **options))
    merged = merged_embedding(run_.model)
    table = np.array(merged.embedding(mx.arange(merged.vocab_size)), np.float64)
    encoder = merged.encoder
    assert np.array(encoder.center) == pytest.approx(table.mean(axis=0), abs=1e-5)
    ids = [i for i in range(8) for i in run_.stages[0].train[i].prompt_ids]
    counts = np.bincount(ids, minlength=len(table))
    prior = 1 / (np.arange(len(table)) + 300)
    shares = counts + 20_000 * prior / prior.sum()
    nats, root = -np.log(shares / shares.sum()), np.sqrt(counts + 1.0)[:, None]
    apart = np.hstack([table - table.mean(axis=0), np.ones((len(table), 1))])
    ridge = np.sqrt(0.01 * (counts + 1).sum() * (table - table.mean(axis=0)).var())
    left = np.vstack([root * apart, ridge * np.eye(apart.shape[1])])
    right = np.concatenate([root[:, 0] * nats, np.zeros(apart.shape[1])])
    gate = np.linalg.lstsq(left, right, rcond=None)[0]
    found = table @ np.array(encoder.gate_weight, np.float64) + encoder.gate_bias.item()
    assert found == pytest.approx(apart @ gate, abs=1e-3)


def test_a_run_is_stored_read_and_described_with_its_start_and_never_exported(tmp_path):
    path = tmp_path / "a"
    trained(path, *SMALL_TREES, *START, "--iters", 3)
    assert load_adapter(path).merge.encoder.start == INFORMATION
    assert json.loads((path / "merge_config.json").read_text())["encoder_start"] == INFORMATION
    assert "starts from information" in run("info", path).out
    model, _ = load(str(BASE), path, 4)
    assert mx.any(merged_embedding(model).encoder.center != 0).item()
    assert_one_error(run("export", path, tmp_path / "b"), 1, "encoder_start")
    result = train(tmp_path / "c", *SMALL_TREES, "--init-from", path, "--iters", 1)
    assert_one_error(result, 1, "--encoder-start is mean, the adapter has information")


def test_without_a_start_of_its_own_nothing_about_it_is_stored(tmp_path):
    trained(tmp_path / "a", *SMALL_TREES, "--iters", 1)
    assert "encoder_start" not in json.loads((tmp_path / "a" / "merge_config.json").read_text())


@pytest.mark.parametrize("schedule", ["", SCHEDULE])
def test_the_encoders_rate_is_its_own_and_a_stopped_run_goes_on_with_it(tmp_path, schedule):
    more = (*SMALL_TREES, *START, "--encoder-learning-rate", 0)
    for name, stops in (("whole", [4]), ("stopped", [2, 4])):
        for iters in stops:
            resume = ("--resume",) if iters != stops[0] else ()
            trained(tmp_path / name, *more, *resume, "--iters", iters, yaml=schedule)
    one, two = (load_adapter(tmp_path / name) for name in ("whole", "stopped"))
    assert all(mx.array_equal(one.tuning_weights[n], a) for n, a in two.tuning_weights.items())
    moved = [n for n, a in one.tuning_weights.items() if n.endswith("lora_b") and mx.any(a != 0)]
    assert moved
    assert not mx.any(one.encoder_weights["w3.weight"] != 0).item()


def test_a_schedule_that_begins_at_zero_has_no_peak_for_the_encoders_rate(tmp_path):
    zero = "lr_schedule: {name: linear_schedule, arguments: [0.0, 1e-3, 99]}\n"
    more = (*SMALL_TREES, *START, "--encoder-learning-rate", 1e-6, "--iters", 1)
    assert_one_error(train(tmp_path / "a", *more, yaml=zero), 1, "found 0, expected more")


def test_the_baseline_of_the_mean_is_the_mean_whatever_an_encoder_starts_from(tmp_path):
    trained(tmp_path / "a", *SMALL_TREES, *START, "--iters", 2)
    model, _ = load(str(BASE), tmp_path / "a", 4)
    merged, block = merged_embedding(model), mx.array([[5, 6, 7, 8]])
    mean = merged.embedding(block).mean(axis=1)
    assert not mx.allclose(merged.encoder(merged.embedding(block)), mean, atol=1e-3).item()
    Mean(4).prepare(model)
    assert mx.allclose(merged.encoder(merged.embedding(block)), mean, atol=1e-6).item()


def test_settings_of_an_encoder_need_one(tmp_path):
    result = train(tmp_path / "a", *SMALL_TREES, *START, "--k", 1)
    assert_one_error(result, 2, "--k = 1 has no encoder: leave --encoder-start out")
