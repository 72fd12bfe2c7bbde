"""A whole run on a tiny base: what it learns, logs, measures and leaves, and who can read that."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from kmerge_mlx import load
from kmerge_mlx.adapters.folder import FILES
from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.data.sources import load_examples
from kmerge_mlx.model import merged_embedding, unfreeze
from kmerge_mlx.train.dataset import TokenizedSet
from kmerge_mlx.train.loop import Figures, Validator
from kmerge_mlx.train.loss import answer_loss
from kmerge_mlx.train.prepare import prepare
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import Place, make_batch, shuffled
from kmerge_mlx.train.settings import TrainSettings
from tests.tiny import steps
from tests.train.test_loss import PAD, V, examples, model_of, naive_loss
from tests.train_runs import (
    BASE,
    NO_DROPOUT,
    SMALL_TREES,
    log_of,
    rows_of,
    state_of,
    tensors_of,
    train,
    trained,
    write_data,
)

REPORT = {"iteration", "train_loss", "learning_rate", "grad_norm", "trained_tokens"}
VALIDATION = {"iteration", "stage", "val_loss", "val_accuracy", "val_balanced_accuracy"}
ITERS, BATCH = 26, 8
QUIET = ("--val-batches", 0)


def labelled(count: int, first: int = 0):
    """Rows whose answer is true more often than false."""
    return [
        row | {"completion": "true" if i % 4 else "false"}
        for i, row in enumerate(rows_of(count, first))
    ]


def unequal(count: int):
    """Rows whose answers are of one to four words."""
    return [
        row | {"completion": " ".join(("AB", "CD", "EF", "GH")[: 1 + i % 4])}
        for i, row in enumerate(rows_of(count))
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run to its end, beside its data."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_data(folder / "data", labelled(64), labelled(20, 64))
    options = ("--batch-size", BATCH, "--iters", ITERS, "--learning-rate", 3e-3, "--save-every", 10)
    trained(
        *(folder / "run", "--data", data, *options),
        *("--steps-per-report", 5, "--steps-per-eval", 12, "--val-batches", -1),
    )
    return folder / "run"


def test_the_log_has_a_record_of_every_report_and_validation(whole):
    """`true` and `false` are two tokens each, and an end."""
    text = (whole / "training" / "log.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    reports = [record for record in records if "train_loss" in record]
    validations = [record for record in records if "val_loss" in record]
    assert len(reports) + len(validations) == len(records)
    assert [r["iteration"] for r in reports] == [5, 10, 15, 20, 25, 26]
    assert [r["trained_tokens"] for r in reports] == [r["iteration"] * BATCH * 3 for r in reports]
    assert [v["iteration"] for v in validations] == [0, 12, 24, 26]
    assert all(set(record) == REPORT for record in reports)
    assert all(set(record) == VALIDATION for record in validations)
    assert all(math.isfinite(n) for r in records for n in r.values() if isinstance(n, float))


def test_the_folder_is_an_adapter_with_the_best_one_and_the_training_in_it(whole):
    assert {path.name for path in whole.iterdir()} == {*FILES, "best", "training"}
    assert {path.name for path in (whole / "best").iterdir()} == set(FILES)
    assert {path.name for path in (whole / "training").iterdir()} == {
        *("log.jsonl", "timing.jsonl", "state.json", "state.safetensors")
    }
    assert {path.name for path in whole.parent.iterdir()} == {"data", "run"}


def test_what_is_saved_is_what_was_validated(whole):
    """Loaded again and measured again, the weights give the logged loss."""
    losses = dict(log_of(whole, "val_loss"))
    best = state_of(whole)["best_iteration"]
    assert losses[best] == min(losses.values())
    pad = json.loads((whole / "merge_config.json").read_text())["pad_token_id"]
    for folder, iteration in ((".", ITERS), ("best", best)):
        model, tokenizer = load(str(BASE), whole / folder, 4)
        examples = load_examples(whole.parent / "data")["valid"]
        rows = TokenizedSet(examples, tokenizer, TrainSettings())
        batch = lambda indices, found: make_batch(found, 4, pad, 700)  # noqa: E731
        measure = Validator(model, rows, 4, 4, batch, Ranks())
        assert measure().loss == pytest.approx(losses[iteration], rel=1e-5)


def test_mlx_lm_itself_loads_the_lora(whole):
    theirs, _ = mlx_lm.load(str(BASE), adapter_path=str(whole))
    theirs = dict(tree_flatten(theirs.parameters()))
    ours = {n.removeprefix("tuning."): a for n, a in tensors_of(whole).items() if n[0] == "t"}
    assert len(ours) == 3 * 7 * 2  # layers, projections, A and B
    for name, array in ours.items():
        assert mx.array_equal(theirs[name], array), name
        assert array.any().item()
    assert {name for name in theirs if "lora_" in name} == set(ours)


@pytest.mark.slow
def test_early_stop_ends_at_the_validation_that_makes_it_enough(tmp_path):
    """Nothing is learnt, so no validation is better than that before the first step."""
    options = ("--learning-rate", 0, "--iters", 50, "--steps-per-eval", 2, "--early-stop", 3)
    result = trained(tmp_path / "run", *SMALL_TREES, *options)
    assert state_of(tmp_path / "run")["iteration"] == 6
    assert "Ended at iteration 6: no better validation since iteration 0" in result.err
    assert [i for i, _ in log_of(tmp_path / "run", "val_loss")] == [0, 2, 4, 6]


def test_a_stage_is_learnt_by_both_accuracies_and_best_is_of_the_stage(tmp_path, monkeypatch):
    """Scripted figures (loss, accuracy, balanced accuracy) of each validation."""
    first = [(9.0, 0.0, 0.0), (2.0, 0.9, 0.4), (3.0, 0.5, 0.5)]
    script = iter([*first, (8.5, 0.9, 0.9), (8.0, 0.4, 0.9), (7.0, 0.6, 0.6)])
    monkeypatch.setattr(Validator, "__call__", lambda *given: Figures(*next(script)))
    limits = ("--stage-threshold", 0.5, "--last-threshold", 0.7, "--curriculum", "small,xsmall")
    path = tmp_path / "run"
    trained(path, *SMALL_TREES, *limits, "--iters", 4, "--steps-per-eval", 1)
    assert log_of(path, "begins") == [(2, "xsmall")]
    state = state_of(path)
    assert (state["best_iteration"], state["best_score"]) == (4, 7.0)
    assert state["finished"] is None


DIVERGING = ("--learning-rate", 1e30, "--max-grad-norm", 0, "--iters", 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*QUIET, "--steps-per-report", 1), "the loss is nan, the gradient's"),
        ((*QUIET, "--save-every", 3), "a weight or a gradient is not a number any more"),
        (("--steps-per-eval", 2), "the validation loss is nan at iteration 2"),
    ],
)
def test_a_run_that_diverges_stops_before_a_bad_weight_is_saved(tmp_path, options, said):
    path = tmp_path / "run"
    result = train(path, *SMALL_TREES, *DIVERGING, *options)
    assert result.code == 1
    (error,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: training diverged: {said}")
    assert f"the save of iteration 0 in {path} is whole: lower --learning-rate" in error
    assert state_of(path)["iteration"] == 0
    assert all(mx.isfinite(array).all().item() for array in tensors_of(path).values())
    trained(path, *SMALL_TREES, *options, "--iters", 1, "--learning-rate", 1e-3, "--force")


def test_an_uneven_last_group_of_batches_is_applied_and_every_token_weighs_the_same(tmp_path):
    """Five batches in groups of three: by hand, two updates on 12 and on 8 rows at once."""
    data, rate = write_data(tmp_path / "data", unequal(30)), 0.05
    given = {"model": str(BASE), "data": str(data), "batch_size": 4, "max_grad_norm": 0.0}
    given |= {"lora_parameters": {"dropout": 0.0}, "adapter_path": str(tmp_path / "none")}
    hand = prepare(TrainSettings.of(given))
    unfreeze(hand.model, hand.tuning)
    losses = []
    batches = shuffled(hand.stages[0].train, 4, 4, (0, 0), Place())
    examples = [next(batches).examples for _ in range(5)]
    for group in (examples[:3], examples[3:]):
        merged = make_batch([e for part in group for e in part], 4, hand.merge.pad_token_id, 700)

        def mean(model: nn.Module, batch=merged) -> mx.array:
            total, tokens = answer_loss(model, batch)
            return total / tokens

        loss, gradients = nn.value_and_grad(hand.model, mean)(hand.model)
        losses.append(loss.item())
        new = tree_map(lambda w, g: w - rate * g, hand.model.trainable_parameters(), gradients)
        hand.model.update(new)

    path = tmp_path / "run"
    options = ("--batch-size", 4, "--grad-accumulation-steps", 3, "--max-grad-norm", 0)
    trained(
        *(path, "--data", data, *options, "--iters", 5, "--steps-per-report", 1),
        *("--optimizer", "sgd", "--learning-rate", rate),
        yaml=NO_DROPOUT,
    )
    assert log_of(path, "train_loss") == [
        (3, pytest.approx(losses[0], rel=1e-5)),
        (5, pytest.approx(losses[1], rel=1e-5)),
    ]
    found = {name.partition(".")[2]: array for name, array in tensors_of(path).items()}
    for name, array in tree_flatten(hand.model.trainable_parameters()):
        name = name.removeprefix("model.embed_tokens.").removeprefix("encoder.")
        assert mx.abs(found[name] - array).max().item() < 1e-5, name


def test_reports_weigh_tokens_over_several_updates(tmp_path):
    data = write_data(tmp_path / "data", unequal(30))
    options = ("--data", data, "--batch-size", 2, "--iters", 6)
    trained(tmp_path / "each", *options, "--steps-per-report", 1)
    trained(tmp_path / "once", *options, "--steps-per-report", 6)
    losses = [loss for _, loss in log_of(tmp_path / "each", "train_loss")]
    ends = [0, *(tokens for _, tokens in log_of(tmp_path / "each", "trained_tokens"))]
    counts = [after - before for before, after in pairwise(ends)]
    assert len(set(counts)) > 1
    mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    assert log_of(tmp_path / "once", "train_loss") == [(6, pytest.approx(mean, rel=1e-5))]


def test_without_a_validation_set_there_is_no_best(tmp_path):
    data = write_data(tmp_path / "data", rows_of(8))
    result = trained(tmp_path / "run", "--data", data, "--iters", 2)
    assert "no validation set" in result.err
    assert "Best" not in result.err
    assert not (tmp_path / "run" / "best").exists()


# Validation's figures: what greedy generation would have written, and means that weigh tokens


K = 3


def figures_of(model, rows, batch_size=4) -> Figures:
    def batches(indices, examples):
        assert [rows[i] for i in indices] == list(examples)
        return make_batch(examples, K, PAD, V)

    return Validator(model, rows, batch_size, K, batches, Ranks())()


def greedy(model, rows: list[TokenizedExample], tokens: int) -> list[list[int]]:
    """What the model writes after each prompt, by mlx-lm's own loop."""
    model.eval()
    prompts = [merged_embedding(model).compress(row.segments) for row in rows]
    return [[int(token) for token, _ in steps(model, prompt, tokens)] for prompt in prompts]


def test_an_answer_is_right_if_greedy_generation_would_have_written_it():
    """Every third answer has another last token, every fourth another first one."""
    model, rows = model_of(True), examples(12, seed=3)
    written = [ids[: 1 + i % 4] for i, ids in enumerate(greedy(model, rows, 4))]
    changed = [list(ids) for ids in written]
    for i, ids in enumerate(changed):
        ids[-1] = (ids[-1] + (i % 3 == 0)) % V
        ids[0] = (ids[0] + (i % 4 == 1)) % V
    rows = [TokenizedExample(row.segments, ids) for row, ids in zip(rows, changed, strict=True)]
    right = np.array([ids == was for ids, was in zip(changed, written, strict=True)])
    assert 3 < right.sum() < 9
    assert figures_of(model, rows).accuracy == pytest.approx(right.mean())


def test_balanced_accuracy_is_the_mean_of_the_answers_recalls():
    """One answer that the model always gives, and three that it never does."""
    model, rows = model_of(True), examples(1, seed=3)
    (written,) = greedy(model, rows, 2)
    wrong = [[(written[0] + i) % V, written[1]] for i in (1, 2, 3)]
    answers = [written] * 5 + [wrong[0]] * 2 + wrong
    rows = [TokenizedExample(rows[0].segments, ids) for ids in answers]
    figures = figures_of(model, rows)
    assert figures.accuracy == pytest.approx(5 / 10)
    assert figures.balanced_accuracy == pytest.approx((1 + 0 + 0 + 0) / 4)


def test_the_loss_is_the_mean_over_tokens_and_not_over_rows_or_batches():
    model, rows = model_of(True), examples(7, seed=5)
    model.eval()
    losses = [naive_loss(model, [row]).item() for row in rows]
    tokens = [len(row.answer_ids) for row in rows]
    assert len(set(tokens)) > 2
    found = figures_of(model, rows).loss
    assert found == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)
    of_rows = np.mean([loss / n for loss, n in zip(losses, tokens, strict=True)])
    assert abs(found - of_rows) > 1e-3
