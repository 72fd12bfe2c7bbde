"""A whole training session: prepare, let a teacher write, train, report.

Owns the order of these, on one machine or several. Whoever calls it shows what happens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks

from kmerge_mlx.errors import TrainError, first_line
from kmerge_mlx.files import read_json
from kmerge_mlx.train.answers import ANSWERS, give_answers, read_answers, write_answers
from kmerge_mlx.train.checkpoint import BEST, STATE, TRAINING
from kmerge_mlx.train.loop import Trainer
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.settings import TrainSettings
from kmerge_mlx.train.setup import Run, prepare
from kmerge_mlx.train.stages import Bar, limits_of
from kmerge_mlx.train.teacher_file import StoredTeacher, store


@dataclass(frozen=True)
class Outcome:
    """How a session ended.

    Args:
        path: The run's folder.
        iteration: Iterations done.
        reason: Why it ended before ``iters``, or None.
        best_path: Folder of the best validation's adapter, or None without validations.
        best_iteration: When that was.
        best_score: Its loss, or divergence from the teacher, in nats a token.
        interrupted: Whether it was asked to stop, and can be resumed.
    """

    path: Path
    iteration: int
    reason: str | None
    best_path: Path | None
    best_iteration: int | None
    best_score: float | None
    interrupted: bool


def train(
    config: TrainSettings,
    bar: Bar,
    watch: Callable[[Run], Sequence[TrainingCallback]],
    ranks: Ranks,
    started: Callable[[Trainer], None] = lambda trainer: None,
) -> Outcome:
    """Trains as a config says, from its beginning or from the last save.

    Args:
        config: The settings.
        bar: Shows work that comes before training.
        watch: A prepared run to what is to be told how it goes.
        ranks: The machines.
        started: Given the trainer before its first step, to be able to stop it.

    Raises:
        KMergeError: Whatever keeps the run from starting or going on.
    """
    run = prepare(config, bar, ranks)
    keep = _answers(run, bar)
    if config.teacher_file:
        _use_file(run, bar, ranks)
    callbacks = [*watch(run), *_reporters(config)] if ranks.rank == 0 else []
    trainer = Trainer(run, callbacks, ranks, keep)
    started(trainer)
    reason = trainer.train()
    state = run.state
    found = state.best_iteration is not None
    return Outcome(
        *(run.path, state.iteration, reason, run.path / BEST if found else None),
        *(state.best_iteration, state.best_score),
        interrupted=reason is None and state.iteration < config.iters,
    )


def saved_settings(path: str | Path) -> dict[str, object]:
    """The settings of the run in a folder, which ``--resume`` begins from; empty without a run.

    Raises:
        TrainError: A run whose state cannot be read.
    """
    file = Path(path) / TRAINING / STATE
    if not file.is_file():
        return {}
    saved = read_json(file, TrainError)
    settings = saved.get("settings") if isinstance(saved, dict) else None
    if not isinstance(settings, dict):
        raise TrainError(f"{file} names no settings: it is not a run's state")
    return settings


def _answers(run: Run, bar: Bar) -> dict[str, bytes]:
    """Has the missing answers written, or takes those of the saved run."""
    if not run.config.teacher_answers:
        return {}
    sets = _sets(run)
    answers = read_answers(run.path) if run.state.rng else None
    if answers is None:
        model = run.teacher.model
        answers = write_answers(model, run.tokenizer, sets, run.config, bar("Answering"))
    give_answers(answers, sets, limits_of(run.config))
    return {ANSWERS: json.dumps(answers).encode()}


def _use_file(run: Run, bar: Bar, ranks: Ranks) -> None:
    """Puts the stored teacher in the place of the real one, and stores it first if need be."""
    config, sets = run.config, _sets(run)
    path = Path(config.teacher_file)
    # The digests of the sets are taken anew: written answers are part of them by now.
    parts = [run.identity.base, *(f"{split} {data.digest}" for split, data in sets.items())]
    parts += [str(config.teacher_top_k), str(config.k)]
    parts += [str(config.teacher_answers), str(config.teacher_max_tokens)]
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    if not path.exists() and ranks.rank == 0:
        store(path, digest, run.teacher, sets, config.batch_size, bar("Asking the teacher"))
    ranks.barrier()
    run.teacher = StoredTeacher(path, digest, sets)


def _sets(run: Run) -> dict:
    stage = run.stages[0]
    return {n: s for n, s in (("train", stage.train), ("valid", stage.valid)) if s is not None}


def _reporters(config: TrainSettings) -> list[TrainingCallback]:
    """mlx-lm's callbacks for the services that ``--report-to`` names."""
    if not config.report_to:
        return []
    try:
        reporter = get_reporting_callbacks(
            config.report_to, config.project_name, config.adapter_path, config.settings()
        )
    except (ValueError, ImportError) as error:
        raise TrainError(f"--report-to {config.report_to}: {first_line(error)}") from error
    return [reporter]
