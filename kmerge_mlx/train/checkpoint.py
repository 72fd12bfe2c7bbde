"""What a run leaves on the disk, so that it can be killed at any moment and lose nothing.

Owns the folder: the adapter as it is now, ``best/`` with the adapter of the best validation, and
``training/`` with everything else that an exact resume needs. It is written whole, beside the one
it replaces. Does not know models or loops.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from kmerge_mlx import __version__
from kmerge_mlx.adapters.folder import FILES, MERGE_CONFIG, Adapter, write_adapter
from kmerge_mlx.errors import TrainError, findings, first_line, short
from kmerge_mlx.files import (
    ALL_DTYPES,
    check_destination,
    clear_leftovers,
    flush,
    read_json,
    read_safetensors,
    replacing_folder,
    write_json,
    write_safetensors,
)
from kmerge_mlx.train.log import LOG, TIMING, RunLog
from kmerge_mlx.train.order import Place

BEST, TRAINING = "best", "training"
STATE, TENSORS = "state.json", "state.safetensors"
FORMAT_VERSION = 1


@dataclass
class State:
    """Where a run stands, but for its tensors.

    Args:
        iteration: Iterations done.
        stage: Which stage of the curriculum, from 0.
        place: How far its data have been read.
        added: Batches added up since the last update.
        trained_tokens: Answer tokens of all updates.
        best_score: Lowest validation score of this stage, or None.
        best_iteration: When that was.
        stale: Validations since then.
        finished: Why the run is over, or None.
        rng: MLX's random state.
        log: Bytes of each log.
    """

    iteration: int = 0
    stage: int = 0
    place: Place = field(default_factory=Place)
    added: int = 0
    trained_tokens: int = 0
    best_score: float | None = None
    best_iteration: int | None = None
    stale: int = 0
    finished: str | None = None
    rng: list[int] = field(default_factory=list)
    log: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Any) -> State:
        """Reads what ``asdict`` made.

        Raises:
            TrainError: Something else.
        """
        if not isinstance(data, dict) or set(data) != {f.name for f in fields(cls)}:
            raise TrainError(f"{STATE} holds {short(data)}, expected a run's state")
        return cls(**{**data, "place": Place(**data["place"])})


@dataclass(frozen=True)
class Identity:
    """What a resumed run must have in common with the one it goes on with.

    Args:
        settings: See ``TrainSettings.settings``.
        fixed: See ``TrainSettings.fixed``.
        base: Digest of the base model's files.
        data: Digest of each stage's training and validation set.
        ranks: How many machines.
    """

    settings: Mapping[str, Any]
    fixed: Mapping[str, Any]
    base: str
    data: list[str]
    ranks: int = 1

    def check(self, saved: Mapping[str, Any], path: Path) -> None:
        """Compares with a saved run.

        Raises:
            TrainError: Every difference, by name.
        """
        then, now = saved.get("fixed") or {}, json.loads(json.dumps(dict(self.fixed)))
        problems = [
            f"{name} is {short(now.get(name))}, the run has {short(then.get(name))}"
            for name in {**now, **then}
            if now.get(name) != then.get(name)
        ]
        if saved.get("base") != self.base:
            model, old = self.settings["model"], (saved.get("settings") or {}).get("model")
            problems.append(f"--model {model} holds other weights than the run's base ({old})")
        if saved.get("data") != self.data and not problems:
            problems.append(
                "the data are not those that the run was started with: give those, or start anew "
                "in another --adapter-path"
            )
        if saved.get("ranks") != self.ranks:
            problems.append(f"found {self.ranks} machines, the run has {saved.get('ranks')}")
        if problems:
            raise TrainError(findings(f"{path} cannot be resumed", problems))


def check_run_destination(path: str | Path, resume: bool, force: bool) -> bool:
    """Finds out whether a run is there, and refuses to write over anything else.

    Args:
        path: The run's folder.
        resume: Whether to go on with a run that is there.
        force: Whether to replace an adapter that is there.

    Returns:
        Whether there is a run to go on with.

    Raises:
        TrainError: Something is there that is neither to be resumed nor replaced.
    """
    path = Path(path)
    if blocking := [p for p in path.parents if p.exists() and not p.is_dir()]:
        raise TrainError(f"cannot write {path}: {blocking[0]} is a file, expected a folder")
    parent = next(p for p in Path(os.path.abspath(path)).parents if p.exists())  # noqa: PTH100
    if not os.access(parent, os.W_OK):
        raise TrainError(f"cannot write {path}: {parent} is not writable; give --adapter-path")
    try:
        clear_leftovers(path)
        there = (path / TRAINING / STATE).is_file()
    except OSError as error:
        raise TrainError(f"cannot write {path}: {error.strerror}") from None
    if there and resume:
        return True
    if there and not force:
        raise TrainError(
            f"{path} holds a run: give --resume to go on with it, --force to replace it, or "
            "another --adapter-path"
        )
    names = (*FILES, BEST, TRAINING)
    check_destination(path, force, "adapter", names, TrainError, marker=MERGE_CONFIG)
    return False


def save(
    path: Path,
    adapter: Adapter,
    state: State,
    identity: Identity,
    tensors: Mapping[str, mx.array],
    best: Adapter | None = None,
    keep: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a run's folder; the previous one stands until this one does.

    Args:
        path: The folder.
        adapter: The weights as they are.
        state: Where the run stands.
        identity: What it is.
        tensors: The optimizer's and whatever else goes on from here.
        best: The adapter of the best validation, or None: it is what it was.
        keep: Further files of ``training/``, by name.

    Raises:
        TrainError: The disk is full, or the place is not writable.
    """
    old = path / TRAINING
    try:
        with replacing_folder(path) as folder:
            write_adapter(adapter, folder)
            if best is not None:
                (folder / BEST).mkdir()
                write_adapter(best, folder / BEST)
            elif state.best_score is not None and (path / BEST).is_dir():
                shutil.copytree(path / BEST, folder / BEST, copy_function=_link)
            training = folder / TRAINING
            training.mkdir()
            # A run that begins has no log: what --force replaces is another one's.
            for name in (LOG, TIMING) if state.iteration else ():
                if (old / name).exists():
                    shutil.copyfile(old / name, training / name)
            for name, data in (keep or {}).items():
                (training / name).write_bytes(data)
            for file in training.iterdir():
                flush(file)
            write_safetensors(training / TENSORS, tensors)
            state.log = RunLog(training).sizes()
            about = {"format_version": FORMAT_VERSION, "kmerge_mlx": __version__}
            write_json(training / STATE, about | asdict(identity) | {"state": asdict(state)})
    except OSError as error:
        reason = error.strerror or first_line(error)
        last = f"; the last save of {path} is whole" if old.exists() else ""
        raise TrainError(f"cannot write {path}: {reason}{last}") from error


def read_state(path: Path) -> tuple[dict[str, Any], State, dict[str, mx.array]]:
    """Reads what :func:`save` wrote in ``training/``.

    Returns:
        The run's identity as saved, its state, its tensors.

    Raises:
        TrainError: Files that are torn, edited or of a newer release.
    """
    about = _about(path)
    tensors = read_safetensors(path / TRAINING / TENSORS, TrainError, ALL_DTYPES)
    return about, State.from_json(about.get("state")), tensors


def read_progress(path: Path) -> State:
    """Where the run in a folder stands, without its tensors.

    Raises:
        TrainError: Files that are torn, edited or of a newer release.
    """
    return State.from_json(_about(path).get("state"))


def _about(path: Path) -> dict[str, Any]:
    file = path / TRAINING / STATE
    about = read_json(file, TrainError)
    version = about.get("format_version") if isinstance(about, dict) else None
    if version != FORMAT_VERSION:
        raise TrainError(
            f"{file} has format_version {short(version)}, this release reads {FORMAT_VERSION}"
        )
    return about


def _link(source: str, target: str) -> None:
    """Shares a file that is never written again; copies it where that is not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
