"""What ``evaluate --json`` printed, read again.

Owns the check of such a file. Does not know how it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.errors import EvaluateError, short
from kmerge_mlx.evaluation.intervals import Interval
from kmerge_mlx.evaluation.report import Score
from kmerge_mlx.files import read_json


@dataclass(frozen=True)
class SavedRow:
    """What one method made of all questions.

    Args:
        method: ``merged``, or a baseline's name.
        k: Its merge factor.
        label: What to call it.
        compression_ratio: Original tokens over positions.
        scores: By group of questions, by name.
    """

    method: str
    k: int
    label: str
    compression_ratio: float
    scores: Mapping[str, Mapping[str, Score]]


@dataclass(frozen=True)
class SavedReport:
    """An evaluation.

    Args:
        version: Of kmerge-mlx.
        device: What it ran on.
        settings: What was asked for.
        groups: Number of questions, by group.
        rows: What each method made of them; those that could not read the prompts are left out.
    """

    version: str
    device: str
    settings: Mapping[str, Any]
    groups: Mapping[str, int]
    rows: tuple[SavedRow, ...]


def read_report(path: Path) -> SavedReport:
    """Reads the object that ``evaluate --json`` printed.

    Raises:
        EvaluateError: It cannot be read, or is no such object.
    """
    data = read_json(path, EvaluateError)
    try:
        groups = {str(name): entry["questions"] for name, entry in data["groups"].items()}
        rows = tuple(_row(entry) for entry in data["rows"] if "refused" not in entry)
        report = SavedReport(
            str(data["kmerge_mlx"]), str(data["device"]), dict(data["settings"]), groups, rows
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else short(str(error))
        raise EvaluateError(
            f"{path} is not what `kmerge-mlx evaluate --json` prints ({reason})"
        ) from None
    if not all(is_int(n, 1) for n in groups.values()) or any(
        set(row.scores) != set(groups) for row in rows
    ):
        raise EvaluateError(f"{path}: its rows do not score the groups that it names")
    return report


def _row(entry: Mapping[str, Any]) -> SavedRow:
    scores = {
        str(group): {str(name): _score(score) for name, score in named.items()}
        for group, named in entry["scores"].items()
    }
    k, ratio = entry["k"], entry["compression_ratio"]
    if not is_int(k, 1) or not is_number(ratio):
        raise ValueError(f"a row has k = {short(k)} and a ratio of {short(ratio)}")
    return SavedRow(str(entry["method"]), k, str(entry["label"]), ratio, scores)


def _score(entry: Mapping[str, Any]) -> Score:
    """A score; null, JSON's word for what is infinite, is NaN."""
    values = {name: float("nan") if v is None else v for name, v in entry.items()}
    if not all(isinstance(value, int | float) for value in values.values()):
        raise ValueError(f"a score is {entry}")
    ends = (values.get("low"), values.get("high"))
    known = None not in ends and all(map(is_number, ends))
    return Score(values["value"], Interval(*ends) if known else None)
