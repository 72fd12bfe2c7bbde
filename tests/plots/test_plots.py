"""Pictures of a run: what is in them, and one line where one cannot be drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kmerge_mlx import plots
from kmerge_mlx.errors import DataError, PlotError
from kmerge_mlx.plots.training import draw_training
from tests.cli_runner import assert_one_error
from tests.evaluations import words_of
from tests.train_runs import SMALL_TREES, train, trained

RUN = (*SMALL_TREES, "--iters", 4, "--steps-per-report", 2, "--steps-per-eval", 2)


def report(iteration: int, **more: object) -> dict:
    return {"iteration": iteration, "train_loss": 3.0 / (iteration + 1), **more}


def validation(iteration: int, **more: object) -> dict:
    figures = {"val_loss": 2.0, "val_accuracy": 0.5, "val_balanced_accuracy": 0.4}
    return {"iteration": iteration, "stage": "small", **figures, **more}


def write_log(path: Path, *records: dict) -> Path:
    (path / "training").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "training" / "log.jsonl").write_text(lines)
    return path


def test_a_run_draws_itself(tmp_path):
    picture = tmp_path / "run.png"
    trained(tmp_path / "run", *RUN, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.png"}


def test_loss_accuracy_and_their_axes_are_named_in_the_format_of_the_name(tmp_path):
    run = write_log(tmp_path / "run", validation(0), report(1), report(2), validation(2))
    (tmp_path / "a.pdf").write_text("an older one")
    draw_training([run], tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    draw_training([run], tmp_path / "a.svg")
    assert words_of(tmp_path / "a.svg") >= {
        *("training", "validation", "accuracy", "balanced accuracy", "iteration"),
        *("loss (nats per answer token)", "answers right in every token", "40%"),
    }


def test_divergence_and_stages_are_drawn_where_there_are_any(tmp_path):
    begins = {"iteration": 3, "begins": "xsmall"}
    run = write_log(tmp_path / "run", report(1), validation(3, val_kl=1.0), begins, report(5))
    draw_training([run], tmp_path / "a.svg")
    assert words_of(tmp_path / "a.svg") >= {"KL to the base", "xsmall"}
    draw_training([write_log(tmp_path / "run", report(1), report(2))], tmp_path / "a.svg")
    words = words_of(tmp_path / "a.svg")
    assert "training" in words
    assert not words & {"validation", "accuracy", "balanced accuracy", "KL to the base"}
    draw_training([write_log(tmp_path / "run")], tmp_path / "a.svg")
    assert "iteration" in words_of(tmp_path / "a.svg")


def test_several_runs_are_told_apart(tmp_path):
    runs = [write_log(tmp_path / f"run{i}", report(1), validation(1)) for i in range(3)]
    draw_training(runs, tmp_path / "a.svg", [f"c = {i}" for i in range(3)])
    wanted = {f"c = {i}: {what}" for i in range(3) for what in ("training", "accuracy")}
    assert words_of(tmp_path / "a.svg") >= wanted
    lines = r"stroke: (#[0-9a-f]{6}); stroke-opacity: 0.35"
    assert len(set(re.findall(lines, (tmp_path / "a.svg").read_text()))) == 3


def test_a_picture_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    run = write_log(tmp_path / "run", report(1))
    (tmp_path / "a.png").mkdir()
    (tmp_path / "a.png" / "x").write_text("x")
    for place in ("a.png", "no/such.png"):
        with pytest.raises(PlotError, match=f"cannot write `plot` .*{place}: ") as caught:
            draw_training([run], tmp_path / place)
        assert len(str(caught.value).splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "a.png"}


def test_a_torn_or_missing_log_is_one_line(tmp_path):
    run = write_log(tmp_path / "run", report(1))
    with (run / "training" / "log.jsonl").open("a") as file:
        file.write('{"iteration": 2, "tr')
    with pytest.raises(DataError, match=r"log\.jsonl line 2: not JSON: "):
        draw_training([run], tmp_path / "a.png")
    with pytest.raises(DataError, match=r"cannot read .*log\.jsonl: there is no such file"):
        draw_training([tmp_path], tmp_path / "a.png")


def test_a_missing_matplotlib_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    result = train(tmp_path / "run", *RUN, "--plot", tmp_path / "a.png")
    assert_one_error(result, 1, "--plot needs matplotlib: pip install 'kmerge-mlx[plot]'")
    assert list(tmp_path.iterdir()) == []
