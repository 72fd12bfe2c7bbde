"""Answers that the base model writes for rows that have none.

Owns the greedy, uncompressed generation and the form in which a run keeps what came of it. Does not
know the loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from kmerge_mlx.errors import TrainError
from kmerge_mlx.generation.stream import batch_generate
from kmerge_mlx.train.checkpoint import TRAINING
from kmerge_mlx.train.dataset import Limits, TokenizedSet
from kmerge_mlx.train.settings import TrainSettings

ANSWERS = "answers.json"
_AT_ONCE = 32

Answers = dict[str, dict[str, list[int]]]


def write_answers(
    model: nn.Module,
    tokenizer: Any,
    sets: Mapping[str, TokenizedSet],
    config: TrainSettings,
    progress: Callable[[int, int], None],
) -> Answers:
    """Lets the base answer every row that has no answer.

    Args:
        model: The base, unmerged.
        tokenizer: Its tokenizer.
        sets: The examples of each split.
        config: The run's.
        progress: Called with (answers written, answers in all).

    Returns:
        The answers' ids, by split and by the row's index (as text, for JSON). One that ended by
        itself has the tokenizer's eos token, one cut at ``teacher_max_tokens`` does not.
    """
    missing = {
        split: [i for i in range(len(data)) if not data.num_answer_tokens(i)]
        for split, data in sets.items()
    }
    done, total = 0, sum(map(len, missing.values()))
    answers: Answers = {split: {} for split in sets}
    end = tokenizer.eos_token_id
    for split, indices in missing.items():
        for start in range(0, len(indices), _AT_ONCE):
            part = indices[start : start + _AT_ONCE]
            response = batch_generate(
                model,
                tokenizer,
                [sets[split][i].segments for i in part],
                max_tokens=config.teacher_max_tokens,
                return_token_ids=True,
            )
            reasons = response.finish_reasons
            for i, ids, reason in zip(part, response.token_ids, reasons, strict=True):
                answers[split][str(i)] = [*ids, end] if reason == "stop" else ids
            done += len(part)
            progress(done, total)
    return answers


def give_answers(answers: Answers, sets: Mapping[str, TokenizedSet], limits: Limits) -> None:
    """Puts written answers where they belong."""
    for split, found in answers.items():
        for index, ids in found.items():
            sets[split].set_answer(int(index), ids, limits)


def read_answers(path: Path) -> Answers | None:
    """What a saved run keeps, or None.

    Raises:
        TrainError: A file that is torn.
    """
    file = path / TRAINING / ANSWERS
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise TrainError(f"{file} cannot be read: the run's answers are lost") from error
