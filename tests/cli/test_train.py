"""``kmerge-mlx train`` as a person meets it: what it shows, how it is stopped, whom it tells."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path

import pytest
from mlx_lm.tuner import callbacks

from kmerge_mlx.cli.train import TrainingBar
from tests.cli_runner import assert_one_error, run
from tests.train_runs import (
    BASE,
    SMALL_TREES,
    log_of,
    rows_of,
    same,
    state_of,
    tensors_of,
    train,
    trained,
    write_data,
)

RUN = (*SMALL_TREES, "--iters", 4, "--steps-per-report", 2, "--steps-per-eval", 4)

GROUPED = (*RUN, "--grad-accumulation-steps", 2, "--iters", 7, "--steps-per-report", 3)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run, and what it wrote."""
    path = tmp_path_factory.mktemp("shown") / "run"
    return path, trained(path, *RUN, "--save-every", 2)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> Path:
    """An unbroken run of two batches an update."""
    path = tmp_path_factory.mktemp("grouped") / "run"
    trained(path, *GROUPED)
    return path


def stop_at(monkeypatch, iteration: int, *signals: signal.Signals) -> None:
    """Sends signals to this process after an iteration of the next run."""
    plain = TrainingBar.on_iteration

    def act(bar: TrainingBar, now: int) -> None:
        plain(bar, now)
        for number in signals if now == iteration else ():
            signal.raise_signal(number)

    monkeypatch.setattr(TrainingBar, "on_iteration", act)


def test_it_says_on_stderr_what_is_trained_and_on_what(shown):
    assert shown[1].out == ""
    first, second = shown[1].err.splitlines()[:2]
    assert first == "Starting: qwen2, K=4, encoder 0.21M and lora 0.02M trainable"
    form = r"Data: small, 120 examples, 40 to validate, prompts compressed (\d\.\d\d)x"
    assert 3.5 < float(re.fullmatch(form, second)[1]) <= 4


def test_reports_are_lines_in_mlx_lms_words_and_validations_and_saves_are_too(shown):
    path, result = shown
    reports = [line for line in result.err.splitlines() if "Train loss" in line]
    number = r"[\d.]+(?:e[+-]\d+)?"
    form = (
        rf"Iter (\d+): Train loss ({number}), Learning Rate ({number}), It/sec {number}, "
        rf"Tokens/sec {number}, Trained Tokens (\d+), Peak mem {number} GB"
    )
    found = [re.fullmatch(form, line).groups() for line in reports]
    losses, tokens = (dict(log_of(path, name)) for name in ("train_loss", "trained_tokens"))
    assert [(int(i), loss) for i, loss, _, _ in found] == [
        (i, f"{loss:.3f}") for i, loss in losses.items()
    ]
    assert {int(i): int(count) for i, _, _, count in found} == tokens
    assert {rate for _, _, rate, _ in found} == {"1.000e-03"}
    validations = re.findall(r"^Iter (\d+): Val loss ([\d.]+), Accuracy", result.err, re.MULTILINE)
    assert validations == [(str(i), f"{loss:.3f}") for i, loss in log_of(path, "val_loss")]
    saves = re.findall(rf"^Iter (\d+): Saved to {path}$", result.err, re.MULTILINE)
    assert saves == ["2", "4"]


def test_the_end_says_where_the_weights_are_and_how_to_try_them(shown):
    path, result = shown
    best, last, _, hint = result.err.splitlines()[-4:]
    state = state_of(path)
    at = f"{state['best_score']:.4f} at iteration {state['best_iteration']}"
    assert best == f"Best validation {at}: {path / 'best'}"
    assert last == f"Last weights: {path}"
    echo, line = hint.split(" | ")
    program, *args = shlex.split(line)
    tried = run(*args, stdin=f"{echo.removeprefix('echo ')}\n".encode())  # as it is printed
    assert (program, tried.code) == ("kmerge-mlx", 0), tried.err
    assert re.search(r"positions \(.*x\), [1-9]\d* merged and 0 raw, ", tried.err)


def test_bars_are_drawn_on_a_terminal_alone(tmp_path, shown):
    data = write_data(tmp_path / "data", rows_of(16), rows_of(8))
    result = trained(tmp_path / "run", "--data", data, "--iters", 3, terminal=True)
    for label in ("Training:", "Validating:", "Tokenizing train:", "tok/s"):
        assert label in result.err
    assert "\r" not in shown[1].err
    assert "Training:" not in shown[1].err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_save_from_which_it_goes_on(
    tmp_path, monkeypatch, grouped, number
):
    """Between the batches of an update, and between two reports: what was added up is not lost."""
    path, before = tmp_path / "run", signal.getsignal(number)
    stop_at(monkeypatch, 4, number)
    result = train(path, *GROUPED)
    assert (result.code, result.out) == (128 + number, "")
    assert "stopping after this iteration (again: at once)" in result.err
    assert "Stopped at iteration 5: --resume goes on from here" in result.err
    assert signal.getsignal(number) is before
    assert (state_of(path)["iteration"], state_of(path)["added"]) == (5, 1)
    monkeypatch.undo()
    trained(path, *GROUPED, "--resume")
    assert same(tensors_of(path), tensors_of(grouped), atol=1e-5)
    for name in ("train_loss", "val_loss"):
        wanted = pytest.approx(dict(log_of(grouped, name)), rel=1e-4)
        assert dict(log_of(path, name)) == wanted


@pytest.mark.parametrize(
    ("times", "code", "saved"),
    [pytest.param(2, 130, 2, id="twice: at once"), pytest.param(1, 0, 4, id="in the last one")],
)
def test_a_second_ctrl_c_ends_it_at_once_and_a_late_one_is_no_interruption(
    tmp_path, monkeypatch, times, code, saved
):
    path = tmp_path / "run"
    stop_at(monkeypatch, 3, *[signal.SIGINT] * times)
    result = train(path, *RUN, "--save-every", 2)
    assert result.code == code
    assert "Traceback" not in result.err
    assert state_of(path)["iteration"] == saved
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Recorder(callbacks.TrainingCallback):
    """In the place of mlx-lm's callback of a service."""

    made: list[Recorder] = []  # noqa: RUF012

    def __init__(self, project_name, log_dir, config, wrapped_callback=None):
        self.about = (project_name, log_dir, config)
        self.train: list[dict] = []
        self.val: list[dict] = []
        Recorder.made.append(self)

    def on_train_loss_report(self, train_info):
        self.train.append(train_info)

    def on_val_loss_report(self, val_info):
        self.val.append(val_info)


def test_services_are_told_what_mlx_lm_tells_them(tmp_path, monkeypatch):
    monkeypatch.setitem(callbacks.SUPPORT_CALLBACK, "wandb", Recorder)
    path = tmp_path / "run"
    trained(path, *RUN, "--report-to", "wandb", "--project-name", "trees")
    (service,) = Recorder.made
    project, folder, settings = service.about
    assert (project, folder, settings["iters"]) == ("trees", str(path), 4)
    assert {
        *("iteration", "train_loss", "learning_rate", "iterations_per_second"),
        *("tokens_per_second", "trained_tokens", "peak_memory"),
    } <= set(service.train[0])
    assert {"iteration", "val_loss", "val_time"} <= set(service.val[0])
    assert [info["iteration"] for info in service.train] == [2, 4]
    assert [info["iteration"] for info in service.val] == [0, 4]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--report-to", "nope"), 2, "--report-to is 'nope', expected wandb, swanlab or both"),
        (("--plot", "x.txt"), 1, "--plot is x.txt, expected a name that ends with .png, .svg"),
        (("--plot", "no/x.png"), 1, "--plot is no/x.png, but there is no folder no"),
        (("--task", "poetry"), 2, "--task is 'poetry', expected one of textualized-tree, amaz"),
        (("--seed", 2**64), 2, "--seed is 18446744073709551616, expected at most"),
        (("--iter", 3), 2, "No such option"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, args, code, said):
    result = run(*("train", "--model", BASE, "--adapter-path", tmp_path / "run"), *RUN, *args)
    assert_one_error(result, code, said)
    assert list(tmp_path.iterdir()) == []


def test_no_model_is_one_line(tmp_path):
    result = run("train", *RUN, "--adapter-path", tmp_path / "run")
    assert_one_error(result, 1, "found no base model: give --model")


def test_a_service_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    def missing(**about):
        raise ImportError("wandb is not installed. please install wandb via: pip install wandb")

    monkeypatch.setitem(callbacks.SUPPORT_CALLBACK, "wandb", missing)
    result = train(tmp_path / "run", *RUN, "--report-to", "wandb")
    assert_one_error(result, 1, "--report-to wandb: wandb is not installed. please install")
    assert list(tmp_path.iterdir()) == []
