"""Writes and reads the folder of a run, so that a run killed at any moment loses nothing.

The folder holds the adapter as it is now (of several K one each in ``k2/``, ``k4/`` and so on),
``best/`` with that of the best validation, and ``training/`` with everything else that an exact
resume needs, and the logs. It is written whole, beside the one that it replaces.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from kmerge_mlx import __version__, files
from kmerge_mlx.adapters.folder import FILES, MERGE_CONFIG, Adapter, write_adapter
from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.data.jsonl import BadLines, read_rows
from kmerge_mlx.errors import DataError, TrainError, findings, first_line, short
from kmerge_mlx.train.rows import Place
from kmerge_mlx.train.settings import TrainSettings

if TYPE_CHECKING:
    from kmerge_mlx.train.prepare import Run

BEST, TRAINING = "best", "training"
STATE, TENSORS, ANSWERS = "state.json", "state.safetensors", "answers.json"
LOG, TIMING = "log.jsonl", "timing.jsonl"
"""One JSON object a line: what a repeated run repeats to the bit, and its speed and memory."""
FORMAT_VERSION = 1
FOLDERS = "k[0-9]*"
"""The folders of the adapters of a run for several K."""

Adapters = Mapping[int, Adapter]
"""By K."""

_NEW = ("keep", "words")
"""Settings of no earlier release, whose files name all the others."""


@dataclass
class State:
    """Where a run is, without its tensors."""

    iteration: int = 0  # done
    stage: int = 0  # of the curriculum
    place: Place = field(default_factory=Place)  # in the stage's data
    added: int = 0  # batches since the last update
    trained_tokens: int = 0  # answer tokens of all updates
    best_score: float | None = None  # lowest of this stage
    best_iteration: int | None = None  # when that was
    stale: int = 0  # validations since then
    finished: str | None = None  # why the run is over
    rng: list[int] = field(default_factory=list)  # MLX's random state; empty before the first save
    log: dict[str, int] = field(default_factory=dict)  # bytes of each log

    @classmethod
    def from_json(cls, data: Any) -> State:
        """Reads what ``asdict`` made; raises TrainError for anything else."""
        try:
            state = cls(**{**data, "place": Place(**data["place"])})
            score, best = state.best_score, state.best_iteration
            numbers = [state.iteration, state.stage, state.added, state.trained_tokens, state.stale]
            numbers += [*vars(state.place).values(), *state.rng, *state.log.values(), best or 0]
            good = (
                set(data) == set(vars(state))
                and all(map(is_int, numbers))
                and (is_number(score) if is_int(best) else score is best is None)
                and (state.finished is None or state.finished.isprintable())
                and len(state.rng) in (0, 2)
                and max(state.place.epoch, *state.rng, 0) < 2**32
                and max(numbers) < 2**63
            )
        except (TypeError, KeyError, AttributeError, ValueError):
            good = False
        if not good:
            raise TrainError(f"{STATE} holds {short(data)}, expected a run's state")
        return state


def check_same(run: Run, saved: Mapping[str, Any]) -> None:
    """Raises TrainError with every difference of a run from the saved one, by name."""
    now, default = (json.loads(json.dumps(s.fixed())) for s in (run.settings, TrainSettings()))
    then = default | saved["settings"]  # an older release did not know all of them
    problems = [
        f"`{name}` is {short(value)}, the run "
        + ("was begun without it" if (old := then.get(name)) is None else f"has {short(old)}")
        for name, value in now.items()
        if value != then.get(name)
    ]
    if saved.get("base") not in run.base:
        model, old = run.settings.model, short(then.get("model"))
        problems.append(
            f"`model` {model} has other weights, or another config, than the run's base, {old}"
        )
    if saved.get("data") != run.data and not problems:
        dated = run.settings.template_date and not saved["settings"].get("template_date")
        day = " (the chat template writes the date: that day's is `template_date`)" * bool(dated)
        problems.append(
            f"the data are not those that the run was started with: give those{day}, or start "
            "anew in another `adapter_path`"
        )
    if saved.get("ranks") != run.ranks.size:
        problems.append(f"found {run.ranks.size} machines, the run has {short(saved.get('ranks'))}")
    if problems:
        raise TrainError(findings(f"{run.path} cannot be resumed", problems))


def check_whole(run: Run) -> None:
    """Raises TrainError if an adapter, or a file of it, is missing in the folder to go on with."""
    best = run.state.best_score is not None and (run.path / BEST).is_dir()
    tops = (run.path, run.path / BEST) if best else (run.path,)
    folders = [at for top in tops for at in _folders(run.merges, top).values()]
    wanted = [at / name if at.is_dir() else at for at in folders for name in FILES]
    missing = dict.fromkeys(at for at in wanted if not at.exists())
    if problems := [f"{at.relative_to(run.path)} is missing" for at in missing]:
        raise TrainError(findings(f"{run.path} cannot be resumed", problems))


def find_run(path: Path, resume: bool, force: bool) -> bool:
    """Whether a folder holds a run to go on with; refuses to write over anything else."""
    try:
        files.clear_leftovers(path)
        there = (path / TRAINING / STATE).is_file()
    except OSError as error:
        raise TrainError(f"cannot write {path}: {error.strerror}") from None
    if there and resume:
        _check_plain(path)
        return True
    if there and not force:
        raise TrainError(
            f"{path} holds a run: give `resume` to go on with it, `force` to replace it, or "
            "another `adapter_path`"
        )
    runs = (p for p in path.absolute().parents if (p / TRAINING / STATE).is_file())
    # Beside what a run for several K wrote there may be a new adapter for another K.
    if path.is_dir() and not there and (run := next(runs, None)):
        raise TrainError(
            f"{path} belongs to the run in {run}: give `resume` with that, or another "
            "`adapter_path`"
        )
    names = (*FILES, BEST, TRAINING, FOLDERS)
    marker = f"{TRAINING}/{STATE}" if there else MERGE_CONFIG
    files.check_destination(path, force, "adapter", names, TrainError, marker=marker)
    return False


def _check_plain(path: Path) -> None:
    """Refuses a run's folder, which may come from a stranger, that leads to files outside of it."""
    folders = [path / BEST, path / TRAINING, *path.glob(FOLDERS), *path.glob(f"{BEST}/{FOLDERS}")]
    inside = [folder / name for folder in (path, *folders) for name in FILES]
    inside += [path / TRAINING / name for name in (STATE, TENSORS, ANSWERS, LOG, TIMING)]
    for at in (*folders, *inside):
        wanted = at.is_dir() if at in folders else at.is_file()
        if at.is_symlink() or (at.exists() and not wanted):
            raise TrainError(f"{at} is not what a run writes: `resume` takes no links or devices")


def save(run: Run, adapters: Adapters, tensors: Mapping[str, mx.array], best: Adapters) -> None:
    """Writes a run's folder; the previous one stays until this one is whole.

    ``best`` has the adapters of the best validation; it is empty where they are what they were.
    """
    path, state, old = run.path, run.state, run.path / TRAINING
    # All else that is the run's own is written anew, these only while they count.
    own = {at / name for at in _folders(adapters, path / BEST).values() for name in FILES}
    try:
        with files.replacing_folder(path) as folder:
            _write(adapters, folder)
            if best:
                _write(best, folder / BEST)
            elif state.best_score is not None and (path / BEST).is_dir():
                for at in _folders(adapters, Path(BEST)).values():
                    (folder / at).mkdir(parents=True, exist_ok=True)
                    for name in FILES:
                        _link(path / at / name, folder / at / name)
            training = folder / TRAINING
            training.mkdir()
            # A run that begins has no log: the one that --force replaces belongs to another run.
            for name in (LOG, TIMING) if state.iteration else ():
                if (old / name).exists():
                    shutil.copyfile(old / name, training / name)
            if run.answers is not None:
                (training / ANSWERS).write_text(json.dumps(run.answers))
            for file in training.iterdir():
                files.flush(file)
            files.write_safetensors(training / TENSORS, tensors)
            state.log = {name: _size(training / name) for name in (LOG, TIMING)}
            about = {"format_version": FORMAT_VERSION, "kmerge_mlx": __version__}
            about |= {"settings": _asked(run.settings), "base": run.base[0], "data": run.data}
            about |= {"ranks": run.ranks.size, "state": asdict(state)}
            files.write_json(training / STATE, about)
            if state.iteration and path.is_dir():  # what --force replaces belongs to another run
                _keep(path, folder, own)
    except OSError as error:
        reason = error.strerror or first_line(error)
        last = f"; the last save of {path} is whole" if old.exists() else ""
        raise TrainError(f"cannot write {path}: {reason}{last}") from error


def _asked(settings: TrainSettings) -> dict[str, Any]:
    """The settings of a run; those of this release only where they were asked for."""
    saved, default = settings.saved(), TrainSettings().saved()
    return {n: v for n, v in saved.items() if n not in _NEW or v != default[n]}


def _folders(adapters: Collection[int], path: Path) -> dict[int, Path]:
    """Where the adapters of a run lie, by K: one alone in the folder, several below it."""
    return {k: path if len(adapters) == 1 else path / f"k{k}" for k in adapters}


def _write(adapters: Adapters, path: Path) -> None:
    for k, folder in _folders(adapters, path).items():
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(adapters[k], folder)
        files.flush(folder)


def read_state(path: Path) -> tuple[dict[str, Any], State, dict[str, mx.array]]:
    """The identity, state and tensors that :func:`save` wrote; TrainError for any others."""
    tensors = files.read_safetensors(path / TRAINING / TENSORS, TrainError, files.ALL_DTYPES)
    about, state = _about(path), read_progress(path)
    if not state.rng:
        raise TrainError(f"{path / TRAINING / STATE} has no random state, as every save has")
    return about, state, tensors


def read_progress(path: Path) -> State:
    """Where the run in a folder is; raises as :func:`read_state`."""
    return State.from_json(_about(path).get("state"))


def saved_settings(path: Path) -> dict[str, Any]:
    """The settings from which a resumed run begins, if any.

    They never allow remote code, or say where anything is written: that the command alone does.
    """
    if not (path / TRAINING / STATE).is_file():
        return {}
    mine = {f.name for f in fields(TrainSettings)} - TrainSettings().saved().keys()
    mine.add("trust_remote_code")
    return {n: v for n, v in _about(path)["settings"].items() if n not in mine}


def _about(path: Path) -> dict[str, Any]:
    file = path / TRAINING / STATE
    about = files.read_json(file, TrainError)
    if not isinstance(about, dict) or not isinstance(about.get("settings"), dict):
        raise TrainError(f"{file} names no settings: it is not a run's state")
    if (version := about.get("format_version")) != FORMAT_VERSION:
        raise TrainError(
            f"{file} has format_version {short(version)}, this release reads {FORMAT_VERSION}"
        )
    return about


def append_log(path: Path, record: dict[str, Any], timing: dict[str, Any]) -> None:
    """Appends a record, and its timing if it has one, to the logs of the run in a folder."""
    for name, line in ((LOG, record), (TIMING, {"iteration": record["iteration"], **timing})):
        if name == LOG or timing:
            unshare(path / TRAINING / name)
            with (path / TRAINING / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def cut_logs(path: Path, state: State) -> None:
    """Drops what was logged after the save from which a run goes on."""
    for name in (LOG, TIMING):
        size = state.log.get(name, 0)
        if _size(path / TRAINING / name) > size:
            unshare(path / TRAINING / name)
            os.truncate(path / TRAINING / name, size)


def unshare(path: Path) -> None:
    """Makes a file that is about to be changed in place a copy: its other hard links stay."""
    path = path.resolve()
    if path.exists() and path.stat().st_nlink > 1:
        with files.replacing_file(path) as new:
            shutil.copy(path, new)


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of the log in a run's ``training/`` folder; raises DataError."""
    for _, record in read_rows(folder / LOG, _record, BadLines(False)):
        yield record


def _record(row: dict[str, Any]) -> dict[str, Any]:
    numbers = [value for name, value in row.items() if name not in ("stage", "begins")]
    if not is_int(row.get("iteration")) or not all(map(is_number, numbers)):
        raise DataError(f"found {short(row)}, expected a record of a run")
    return row


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _keep(old: Path, new: Path, own: Collection[Path]) -> None:
    """Takes over what others put into a run's folder: notes, or an adapter for a further K."""
    for child in old.iterdir():
        target = new / child.name
        if child.is_dir() and not child.is_symlink():
            _keep(child, target, own)
        elif child not in own and not target.exists():
            new.mkdir(parents=True, exist_ok=True)
            if child.is_symlink():
                target.symlink_to(child.readlink())
            else:
                _link(child, target)


def _link(source: Path, target: Path) -> None:
    """Shares a file that is never written again; copies it where that is not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
