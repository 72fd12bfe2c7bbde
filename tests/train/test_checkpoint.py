"""Going on with a run: from its last save, with its own settings, base and data, or not at all."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.cli.train import TrainingBar
from kmerge_mlx.errors import TrainError
from kmerge_mlx.files import alone
from tests.cli_runner import assert_one_error, change_json, copy_base
from tests.train_runs import (
    BASE,
    SMALL_TREES,
    kmerge,
    log_of,
    rows_of,
    state_of,
    train,
    trained,
    write_data,
)

EACH = (*SMALL_TREES, "--steps-per-report", 1, "--steps-per-eval", 2, "--save-every", 1)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A run of four iterations. Read-only: copy it to go on."""
    path = tmp_path_factory.mktemp("half") / "run"
    trained(path, *EACH, "--iters", 4)
    return path


@pytest.fixture
def path(tmp_path, half) -> Path:
    """A copy of that run, to go on with or to break."""
    return Path(shutil.copytree(half, tmp_path / "run"))


def files_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def resume(path: Path, *options: object):
    return kmerge("train", "--adapter-path", path, "--resume", *options)


def test_resume_alone_goes_on_with_the_saved_settings(tmp_path):
    data, path = write_data(tmp_path / "data", rows_of(16)), tmp_path / "run"
    options = ("--data", data, "--iters", 9, "--save-every", 2, "--k", 2, "--optimizer", "sgd")
    trained(path, *options, "--learning-rate", 1e-2, yaml="lora_parameters: {rank: 2}\n")
    change_json(path / "training" / "state.json", state=state_of(path) | {"iteration": 7})
    result = resume(path)
    assert result.code == 0, result.err
    assert result.err.startswith("Resuming at iteration 7: qwen2, K=2, ")
    assert state_of(path)["iteration"] == 9
    saved = json.loads((path / "training" / "state.json").read_text())["settings"]
    assert (saved["learning_rate"], saved["lora_parameters"]) == (1e-2, {"rank": 2})


def test_a_changed_setting_or_base_is_named_and_nothing_is_touched(tmp_path, path):
    other = Path(shutil.copytree(BASE, tmp_path / "other"))
    weights = mx.load(str(other / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    mx.save_safetensors(str(other / "model.safetensors"), weights, metadata={"format": "mlx"})
    scaled = copy_base(BASE, tmp_path / "scaled", rope_scaling={"type": "linear", "factor": 2.0})
    before = files_of(path)
    for options, said in (
        (("--learning-rate", 2e-3, "--k", 2), "--learning-rate is 0.002, the run has 0.001"),
        (("--teacher", "base"), "--teacher is 'base', the run was begun without it"),
        (
            ("--model", other),
            f"--model {other} has other weights, or another config, than the run's base, ",
        ),
        (("--model", scaled), f"--model {scaled} has other weights, or another config, than"),
    ):
        result = resume(path, "--iters", 9, *options)
        assert (result.code, result.out) == (1, "")
        assert f"error: {path} cannot be resumed" in result.err
        assert said in result.err
        assert ("--k is 2, the run has 4" in result.err) == ("--k" in options)
        assert files_of(path) == before


def test_the_same_base_and_data_may_be_somewhere_else(tmp_path):
    one = write_data(tmp_path / "data", rows_of(16))
    path = tmp_path / "run"
    trained(path, "--data", one, "--iters", 2)
    two = Path(shutil.move(one, tmp_path / "moved"))
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    result = resume(path, "--iters", 4, "--data", two, "--model", base)
    assert result.code == 0, result.err
    write_data(two, rows_of(16, 1))
    result = resume(path, "--iters", 6, "--data", two, "--model", base)
    assert_one_error(result, 1, "the run was started with: give those, or start anew")


def test_a_run_that_0_1_0_began_goes_on_with_its_base_and_with_no_other(path):
    """The number is what 0.1.0 wrote for the fixture's base."""
    was = "5f4ba6278daadd9b25d169424490ba8e85b408366812c4fc8663230fefbd183f"
    file = path / "training" / "state.json"
    change_json(file, base=was)
    assert resume(path, "--iters", 5).code == 0
    assert json.loads(file.read_text())["base"] != was
    change_json(file, base=was[:-1] + "0")
    assert_one_error(resume(path, "--iters", 6), 1, "has other weights, or another config, than")


def test_a_run_that_is_there_is_replaced_with_its_log_by_force_alone(path):
    before = files_of(path)
    said = f"{path} holds a run: give --resume to go on with it, --force to replace it, or another"
    assert_one_error(train(path, *EACH, "--iters", 1), 1, said)
    assert files_of(path) == before
    trained(path, *EACH, "--iters", 2, "--seed", 5, "--force")
    assert [iteration for iteration, _ in log_of(path, "train_loss")] == [1, 2]
    assert [iteration for iteration, _ in log_of(path, "val_loss")] == [0, 2]
    assert state_of(path)["iteration"] == 2


def test_an_adapter_is_replaced_by_force_alone_and_other_things_never(tmp_path, adapter_path):
    path = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    assert_one_error(train(path, *EACH), 1, "exists: choose another folder, or give --force")
    assert_one_error(train(path, *EACH, "--resume"), 1, "exists: choose another folder")
    trained(path, *EACH, "--iters", 1, "--force")
    assert state_of(path)["iteration"] == 1
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for options in ((), ("--force",), ("--resume",)):
        assert_one_error(train(other, *EACH, *options), 1, f"{other} ")
        assert files_of(other) == {"thesis.txt": b"years of work"}


def test_resume_where_nothing_is_begins_a_run(tmp_path):
    """So the same command does for the first start and for every one after a kill."""
    result = trained(tmp_path / "run", *EACH, "--iters", 1, "--resume")
    assert result.err.startswith(f"{tmp_path / 'run'} holds no run to resume: starting one: ")
    assert state_of(tmp_path / "run")["iteration"] == 1


STATE, TENSORS = "training/state.json", "training/state.safetensors"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (STATE, b"[]", "state.json names no settings: it is not a run's state"),
        (STATE, {"settings": {"nope": 1}}, "unknown setting 'nope'"),
        (STATE, {"format_version": 2}, "has format_version 2, this release reads 1"),
        (STATE, {"state": {"iteration": 4}}, "holds {'iteration': 4}, expected a run's state"),
        (STATE, {"state.best_score": None}, "expected a run's state"),
        (STATE, {"state.trained_tokens": 2**70}, "expected a run's state"),
        (STATE, {"state.rng": []}, "has no random state, as every save has"),
        (STATE, {"state.added": 1}, "its state is not of a run like this"),
        (STATE, {"state.stage": 1}, "its state is not of a run like this"),
        (STATE, {"settings.num_trees": 2**62}, "--num-trees is 46116860"),
        (TENSORS, b"\x09", "state.safetensors is torn or not a safetensors file"),
    ],
)
def test_a_torn_run_is_one_line(path, name, damage, said):
    """Other bytes in a file, or other entries."""
    if isinstance(damage, bytes):
        (path / name).write_bytes(damage)
    else:
        document = json.loads((path / name).read_text())
        for at, value in damage.items():
            *outer, last = at.split(".")
            (document[outer[0]] if outer else document)[last] = value
        (path / name).write_text(json.dumps(document))
    before = files_of(path)
    code = 2 if "unknown" in said or said.startswith("--") else 1
    assert_one_error(resume(path, "--iters", 9), code, said)
    assert files_of(path) == before


def limited(size: int) -> None:
    """No file of this process may grow beyond so many bytes: to MLX and Python, a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_one_line_and_the_last_save_is_whole(path, monkeypatch):
    """In the middle of the save after the fifth iteration."""
    act = lambda bar, iteration: limited(60_000) if iteration == 5 else None  # noqa: E731
    monkeypatch.setattr(TrainingBar, "on_iteration", act)
    try:
        result = resume(path, "--iters", 9)
    finally:
        limited(resource.RLIM_INFINITY)
    assert result.code == 1
    (error,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: cannot write {path}: ")
    assert error.endswith(" whole")
    assert load_adapter(path).merge.merge_factor == 4
    assert state_of(path)["iteration"] == 5
    assert [p.name for p in path.parent.iterdir()] == ["run"]
    monkeypatch.undo()
    assert resume(path, "--iters", 9).code == 0
    assert [i for i, _ in log_of(path, "train_loss")] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_save_holds_no_gradient_that_is_no_number(tmp_path):
    """Inside a group of batches the weights are still good, and what is added up is not."""
    path = tmp_path / "run"
    rate = ("--learning-rate", 1e30, "--max-grad-norm", 0, "--val-batches", 0)
    train(path, *EACH, *rate, "--grad-accumulation-steps", 4, "--iters", 8, "--save-every", 2)
    tensors = mx.load(str(path / "training" / "state.safetensors"))
    assert all(mx.isfinite(array).all().item() for array in tensors.values())


def test_a_saved_run_permits_nothing_and_writes_nowhere_else(tmp_path):
    """Its folder may come from a stranger."""
    data, path = write_data(tmp_path / "data", rows_of(16)), tmp_path / "run"
    file, precious = tmp_path / "teacher.safetensors", tmp_path / "precious.txt"
    teacher = ("--teacher", "base", "--teacher-top-k", 2, "--teacher-file", file)
    trained(path, "--data", data, *teacher, "--iters", 1)
    precious.write_text("years of work")
    state = json.loads((path / "training" / "state.json").read_text())
    settings, log = state["settings"] | {"trust_remote_code": True}, state["state"]["log"]
    sizes = {"../../precious.txt": 0} | log
    change_json(
        path / "training" / "state.json", settings=settings, state=state["state"] | {"log": sizes}
    )
    assert "trust_remote_code: false" in resume(path, "--print-config").out
    assert resume(path, "--iters", 2).code == 0
    assert precious.read_text() == "years of work"
    file.unlink()
    assert_one_error(resume(path, "--iters", 3), 1, "teacher.safetensors")
    assert not file.exists()


def test_where_a_resumed_run_writes_is_not_taken_from_its_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture, settings = tmp_path / "picture.svg", json.loads((path / STATE).read_text())["settings"]
    picture.write_text("years of work")
    settings |= {"plot": str(picture), "adapter_path": "elsewhere", "force": True, "seed": 0}
    settings |= {"report_to": "wandb", "project_name": "x"}
    change_json(path / "training" / "state.json", settings=settings)
    path.rename("adapters")  # the default, which the command does not name
    result = kmerge("train", "--resume", "--iters", 5)
    assert result.code == 0, result.err
    assert state_of(Path("adapters"))["iteration"] == 5
    assert picture.read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapters", "picture.svg"]


def test_a_state_without_its_random_numbers_writes_no_file_that_it_names(tmp_path):
    """A state as it is before the first save, so that a file of the teacher would be made."""
    data, path = write_data(tmp_path / "data", rows_of(16)), tmp_path / "run"
    file = tmp_path / "teacher.safetensors"
    teacher = ("--teacher", "base", "--teacher-top-k", 2, "--teacher-file", file)
    trained(path, "--data", data, *teacher, "--iters", 1)
    file.unlink()
    change_json(path / "training" / "state.json", state=state_of(path) | {"rng": []})
    assert_one_error(resume(path, "--iters", 2), 1, "has no random state")
    assert not file.exists()


@pytest.mark.parametrize(
    "name", ["training/log.jsonl", "training", "best", "best/adapters.safetensors"]
)
def test_a_runs_folder_that_leads_elsewhere_is_refused(tmp_path, path, name):
    elsewhere = tmp_path / "precious"
    (path / name).rename(elsewhere)
    (path / name).symlink_to(elsewhere)
    before = elsewhere.read_bytes() if elsewhere.is_file() else files_of(elsewhere)
    said = f"{path / name} is not what a run writes: --resume takes no links or devices"
    assert_one_error(resume(path, "--iters", 5), 1, said)
    assert before == (elsewhere.read_bytes() if elsewhere.is_file() else files_of(elsewhere))


@pytest.mark.parametrize("cut", [False, True])
def test_a_run_of_hard_links_leaves_the_run_that_it_shares_files_with(tmp_path, path, cut):
    """As ``cp -al`` makes it; its logs are extended, or cut first."""
    for name in ("log.jsonl", "timing.jsonl") if cut else ():
        with (path / "training" / name).open("a") as file:  # after the save, before a kill
            file.write('{"iteration": 5}\n')
    before = files_of(path)
    copy = Path(shutil.copytree(path, tmp_path / "copy", copy_function=os.link))
    assert resume(copy, "--iters", 6).code == 0
    assert files_of(path) == before
    assert state_of(copy)["iteration"] == 6


def test_a_pipe_in_a_runs_folder_is_not_waited_for(path):
    (path / "training" / "timing.jsonl").unlink()
    os.mkfifo(path / "training" / "timing.jsonl")
    assert_one_error(resume(path, "--iters", 5), 1, "is not what a run writes")


def test_of_two_runs_in_one_folder_the_second_is_refused(tmp_path):
    path = tmp_path / "new" / "run"
    with alone(path, TrainError):
        said = f"error: {path} is being written by another run: wait, or name another"
        assert_one_error(train(path, *EACH, "--iters", 1), 1, said)
    assert [*tmp_path.iterdir()] == []
    trained(path, *EACH, "--iters", 1)
    with alone(path, TrainError):
        assert_one_error(resume(path, "--iters", 2), 1, said)
    assert [p.name for p in path.parent.iterdir()] == ["run"]
