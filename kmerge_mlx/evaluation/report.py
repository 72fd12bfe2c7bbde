"""The result of an evaluation: every score with its interval, to JSON and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from rapidfuzz.distance import Levenshtein

from kmerge_mlx import __version__
from kmerge_mlx.config import is_int
from kmerge_mlx.errors import EvaluateError, short
from kmerge_mlx.evaluation import metrics
from kmerge_mlx.evaluation.baselines import Method
from kmerge_mlx.evaluation.metrics import bootstrap_interval, wilson_interval
from kmerge_mlx.evaluation.questions import Group, Questions
from kmerge_mlx.evaluation.scoring import Prediction
from kmerge_mlx.evaluation.settings import PERPLEXITY, EvaluateSettings
from kmerge_mlx.files import read_json
from kmerge_mlx.generation.cost import Spread
from kmerge_mlx.prompts.policy import Layout

if TYPE_CHECKING:
    from kmerge_mlx.evaluation.recommend import Recommendation

_SHARES = ("balanced_accuracy", "accuracy", "f1", "f1_macro", "token_f1", "exact_match", "recall")
COLUMNS = dict.fromkeys((*_SHARES, "edit_similarity"), True) | {PERPLEXITY: False}
"""The scores of a table, in its order, and whether each is a share."""
_JSON_NAMES = {"k": "ks", "baseline": "baselines", "length": "lengths", "depth": "depths"}
_UNREPORTED = ("predictions", "json", "plot", "recommend", "budget", "recommend_by")


@dataclass(frozen=True)
class Score:
    """A score, NaN where it cannot be computed, and its 95% interval, or None without one."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """The value and the interval's ends; JSON has no infinity, so that is null."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return {name: value if math.isfinite(value) else None for name, value in known.items()}


@dataclass(frozen=True)
class Row:
    """The scores of one method, or why it cannot read these prompts."""

    method: str
    k: int
    label: str
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # tokens, positions by group
    scores: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)  # by group and name
    refused: str | None = None
    kv_bytes: Mapping[str, float] = field(default_factory=dict)  # mean of a group's prompts
    time_to_first_token: Mapping[str, Spread] = field(default_factory=dict)  # seconds, by group

    def ratio(self, groups: Iterable[str]) -> float:
        """Original tokens over positions, of some groups."""
        tokens, positions = zip(*(self.sizes[name] for name in groups), strict=True)
        return sum(tokens) / sum(positions)

    @property
    def compression_ratio(self) -> float:
        """Original tokens over positions, of all groups."""
        return self.ratio(self.sizes)

    def to_json(self) -> dict[str, Any]:
        """Everything, by name."""
        entry = {"method": self.method, "k": self.k, "label": self.label}
        if self.refused is not None:
            return entry | {"refused": self.refused}
        tokens, positions = map(sum, zip(*self.sizes.values(), strict=True))
        scores = {g: {n: s.to_json() for n, s in named.items()} for g, named in self.scores.items()}
        sizes = {"prompt_tokens": tokens, "positions": positions}
        times = {group: asdict(spread) for group, spread in self.time_to_first_token.items()}
        costs = {"kv_bytes": self.kv_bytes, "time_to_first_token": times}
        ratio = {"compression_ratio": self.compression_ratio}
        return entry | sizes | ratio | costs | {"scores": scores}


@dataclass(frozen=True)
class Report:
    """The result of an evaluation."""

    version: str  # of kmerge-mlx
    device: str
    settings: Mapping[str, Any]
    layout: Mapping[str, Any]
    bad_rows: int
    about: Mapping[str, Mapping[str, Any]]  # by group: questions; labels, length, depth if any
    rows: Sequence[Row]
    recommended: Recommendation | None = None  # if one was asked for

    @property
    def groups(self) -> dict[str, int]:
        """Number of questions, by group."""
        return {name: group["questions"] for name, group in self.about.items()}

    @property
    def depths(self) -> dict[int, dict[str, float]]:
        """Of recall, the depth of each group, by the length of its prompts; else empty."""
        found: dict[int, dict[str, float]] = {}
        for name, group in self.about.items():
            if "length" in group:
                found.setdefault(group["length"], {})[name] = group["depth"]
        return found

    @property
    def measured(self) -> list[Row]:
        """The rows of methods that could read the prompts."""
        return [row for row in self.rows if row.refused is None]

    def to_json(self) -> dict[str, Any]:
        """Everything, by name, as :func:`read_report` reads it."""
        names = {"version": "kmerge_mlx", "about": "groups"}
        named = {names.get(name, name): value for name, value in vars(self).items()}
        if (found := named.pop("recommended")) is not None:
            named["recommended"] = found.to_json()
        return named | {"rows": [row.to_json() for row in self.rows]}


def make_report(
    settings: EvaluateSettings, questions: Questions, layout: Layout, rows: Sequence[Row]
) -> Report:
    """Makes the report of an evaluation."""
    named = asdict(settings) | {"baseline": settings.baselines}
    unnamed = (*_UNREPORTED, *(["keep"] if settings.keep is None else []))
    about: dict[str, dict[str, Any]] = {}
    for group in questions.groups:
        about[group.name] = {"questions": questions.sizes()[group.name]}
        about[group.name] |= {"labels": list(group.labels)} if group.labels else {}
        about[group.name] |= dict(zip(("length", "depth"), group.place or (), strict=False))
    return Report(
        __version__,
        str(mx.default_device()),
        {_JSON_NAMES.get(n, n): v for n, v in named.items() if n not in unnamed},
        layout.to_json(),
        questions.bad,
        about,
        rows,
    )


def read_report(path: Path) -> Report:
    """Reads the object that ``evaluate --json`` printed; raises EvaluateError for another."""
    data = read_json(path, EvaluateError)
    try:
        rows = [_saved_row(row) for row in data["rows"] if "refused" not in row]
        about, settings = dict(data["groups"]), dict(data["settings"])
        known = all(is_int(group["questions"], 1) for group in about.values())
        if not known or any(set(row.scores) != set(about) for row in rows):
            raise ValueError("its rows do not score the groups that it names")
        return Report(str(data["kmerge_mlx"]), str(data["device"]), settings, {}, 0, about, rows)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else short(str(error))
        raise EvaluateError(
            f"{path} is not what `kmerge-mlx evaluate --json` prints ({reason})"
        ) from None


def _saved_row(row: Mapping[str, Any]) -> Row:
    sizes = row["prompt_tokens"], row["positions"]
    if not all(is_int(n, 1) for n in (row["k"], *sizes)):
        raise ValueError(f"a row has k = {short(row['k'])} and sizes of {short(sizes)}")

    def read(score: Mapping[str, Any]) -> Score:
        return Score(**{key: math.inf if v is None else float(v) for key, v in score.items()})

    scores = {g: {n: read(s) for n, s in named.items()} for g, named in row["scores"].items()}
    # 0.1.0 has no costs.
    kv_bytes = {group: float(size) for group, size in row.get("kv_bytes", {}).items()}
    times = row.get("time_to_first_token", {})
    times = {group: Spread.of(map(float, spread["trials"])) for group, spread in times.items()}
    names = str(row["method"]), row["k"], str(row["label"])
    return Row(*names, {"all": sizes}, scores, kv_bytes=kv_bytes, time_to_first_token=times)


def cell(name: str, score: Score) -> str:
    """A score and its interval as a table shows it."""
    value, low, high = score.value, score.low, score.high
    if COLUMNS[name]:
        return f"{value:.2%} ({100 * low:.1f}-{100 * high:.1f})"
    shown = [
        f"{number:.4g}" if number < 1000 else f"{number:,.0f}"
        for number in (value, low, high)
        if number is not None
    ]
    return shown[0] if low is None else f"{shown[0]} ({shown[1]}-{shown[2]})"


def row_of(method: Method, questions: Questions, predictions: Sequence[Prediction]) -> Row:
    """Scores a method's answers, one for each question."""
    sizes, scores = {}, {}
    for group in questions.groups:
        pairs = zip(questions.items, predictions, strict=True)
        mine = [(q.answers, p) for q, p in pairs if q.group == group.name]
        answers, answered = zip(*mine, strict=True)
        tokens = sum(prediction.prompt_tokens for prediction in answered)
        sizes[group.name] = tokens, sum(prediction.positions for prediction in answered)
        written = questions.limits.get(group.name) != 0
        scores[group.name] = group_scores(group, answers, answered, written)
    return Row(method.name, method.k, method.label, sizes, scores)


def group_scores(
    group: Group,
    answers: Sequence[Sequence[str]],
    predictions: Sequence[Prediction],
    written: bool = True,
) -> dict[str, Score]:
    """The scores of a group by name, with the right answers for each prediction (at least one).

    Where no answer was ``written``, that is perplexity alone.
    """
    scores: dict[str, Score] = {}
    if written and group.labels:
        texts, wanted = _texts(answers, predictions)
        scores = _label_scores(group.labels, wanted, texts)
    elif written:
        rows = row_scores(group, answers, predictions)
        scores = {name: _mean(name, values) for name, values in rows.items()}
    terms = np.array([(p.nll, p.answer_tokens) for p in predictions], np.float64)
    # A model that overflows has infinite likelihoods, or NaN.
    finite = np.isfinite(terms).all()
    interval = bootstrap_interval(terms, metrics.perplexity) if finite else ()
    return scores | {PERPLEXITY: Score(float(metrics.perplexity(terms.sum(axis=0))), *interval)}


def _holds(text: str, exact: str) -> bool:
    """Whether a text holds a string that is not a part of a longer word or number."""
    return re.search(rf"(?<!\w){re.escape(exact)}(?!\w)", text) is not None


def row_scores(
    group: Group, answers: Sequence[Sequence[str]], predictions: Sequence[Prediction]
) -> dict[str, np.ndarray]:
    """The scores that are means over a group's questions: by name, each one's share (n,)."""
    texts, wanted = _texts(answers, predictions)
    if group.squad:
        exact, f1 = np.array([*map(metrics.squad_scores, answers, texts)]).T
        return {"token_f1": f1, "exact_match": exact}
    pairs = zip(wanted, texts, strict=True)
    right = np.array(
        [(_holds(text, a) if group.anywhere else a == text) for a, text in pairs], float
    )
    if group.labels or group.place:
        return {"accuracy" if group.labels else "recall": right}
    similar = np.array([*map(Levenshtein.normalized_similarity, texts, wanted)])
    return {"exact_match": right, "edit_similarity": similar}


def _texts(
    answers: Sequence[Sequence[str]], predictions: Sequence[Prediction]
) -> tuple[list[str], list[str]]:
    """What was answered, and the (first) right answers."""
    return [p.text.strip() for p in predictions], [a.strip() for a, *_ in answers]


def _mean(name: str, values: np.ndarray) -> Score:
    if name in ("exact_match", "recall"):
        interval = wilson_interval(int(values.sum()), len(values))
    else:
        interval = bootstrap_interval(values, lambda sums: sums / len(values))
    return Score(float(values.mean()), *interval)


def _label_scores(
    labels: Sequence[str], answers: Sequence[str], texts: Sequence[str]
) -> dict[str, Score]:
    outcomes = metrics.label_outcomes(answers, texts, labels)
    counts = outcomes.sum(axis=0)
    right, answered = counts[metrics.RIGHT], counts[metrics.ANSWERED]
    macro = partial(metrics.macro_f1, resampled_from=counts)
    wilson = wilson_interval(int(right.sum()), len(answers))
    balanced = metrics.mean_interval(right, answered)
    f1 = bootstrap_interval(outcomes, lambda sums: metrics.f1(sums)[..., 0])
    return {
        "accuracy": Score(float(right.sum() / len(answers)), *wilson),
        "balanced_accuracy": Score(float(metrics.balanced_accuracy(counts)), *balanced),
        "f1": Score(float(metrics.f1(counts)[0]), *f1),
        "f1_macro": Score(float(macro(counts)), *bootstrap_interval(outcomes, macro)),
        "majority_accuracy": Score(float(answered.max() / answered.sum())),
        "majority_balanced_accuracy": Score(float(1 / (answered > 0).sum())),
    }
