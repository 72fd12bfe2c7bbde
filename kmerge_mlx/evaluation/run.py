"""One evaluation from its settings to its table.

Owns the order of things: questions, models one after the other, batches, the file of answers. Does
not print; how far it is goes to a callback.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters.folder import FILES, adapter_folder
from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.layout import TokenizedExample, tokenize
from kmerge_mlx.errors import EvaluateError, KMergeError
from kmerge_mlx.evaluation.baselines import (
    Method,
    adapters,
    layout_of,
    reader,
    take_encoder_away,
    wanted,
)
from kmerge_mlx.evaluation.predictions import PredictionsFile
from kmerge_mlx.evaluation.questions import Bar, Questions, load_questions
from kmerge_mlx.evaluation.recall import recall_questions
from kmerge_mlx.evaluation.report import Row, row_of
from kmerge_mlx.evaluation.scoring import Scorer, in_batches
from kmerge_mlx.evaluation.settings import MEAN, RECALL, EvaluateConfig
from kmerge_mlx.prompts.policy import Layout
from kmerge_mlx.prompts.segments import Segment

MORE_TOKENS = 8
"""How many tokens longer than a right one an answer may be in which the right one is looked for."""


@dataclass(frozen=True)
class Report:
    """What an evaluation measured.

    Args:
        config: What it was to measure.
        questions: What was asked.
        rows: What each method made of it.
        layout: How prompts were laid out.
    """

    config: EvaluateConfig
    questions: Questions
    rows: Sequence[Row]
    layout: Layout

    def to_json(self) -> dict[str, Any]:
        """Everything but the answers, by name; where these are kept makes no difference."""
        settings, sizes = asdict(self.config), self.questions.sizes()
        del settings["predictions"]
        return {
            "kmerge_mlx": __version__,
            "device": str(mx.default_device()),
            "settings": settings,
            "layout": asdict(self.layout),
            "bad_rows": self.questions.bad,
            "groups": {
                group.name: {"questions": sizes[group.name], **group.to_json()}
                for group in self.questions.groups
            },
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass(frozen=True)
class _Asked:
    """What every method is asked.

    Args:
        questions: The questions.
        rows: Prompt and right answer of each, as ids.
        limits: Most tokens of each answer.
    """

    questions: Questions
    rows: Sequence[TokenizedExample]
    limits: Sequence[int]


def evaluate(config: EvaluateConfig, bar: Bar) -> Report:
    """Measures what a config asks for.

    Args:
        config: What to measure, and on what.
        bar: A label to what is called with (work done, work in all).

    Raises:
        KMergeError: A model, an adapter, data or a file that is not as it should be; nothing is
            written then but whole batches of answers.
    """
    methods = wanted(config)
    folder = base.resolve(config.model)
    tokenizer = base.read_tokenizer(
        folder, base.read_config(folder), config.model, config.trust_remote_code
    )
    layout = layout_of(config, methods)
    layout = replace(layout, chat_template=layout.chat_template and tokenizer.has_chat_template)
    asked = _ask(config, tokenizer, layout, bar)
    identity = _identity(config, methods, folder, asked, layout)
    file = PredictionsFile(config.predictions, identity, len(asked.rows))
    progress, total = bar("Evaluating"), len(methods) * len(asked.rows)
    found: dict[Method, Row] = {}
    for k in sorted({method.adapter_k for method in methods}):
        mine = [method for method in methods if method.adapter_k == k]
        before = len(found) * len(asked.rows)
        found |= _measured(config, mine, asked, file, lambda n, b=before: progress(b + n, total))
    progress(total, total)
    return Report(config, asked.questions, [found[method] for method in methods], layout)


def _measured(
    config: EvaluateConfig,
    methods: Sequence[Method],
    asked: _Asked,
    file: PredictionsFile,
    progress: Callable[[int], None],
) -> dict[Method, Row]:
    """What methods that read with one model make of the questions; the model is gone after."""
    model, tokenizer = reader(config, methods[0].adapter_k)
    scorer = Scorer(model, tokenizer, config.batch_size)
    found = {}
    for number, method in enumerate(methods):
        if method.name == MEAN:
            take_encoder_away(model)
        done = number * len(asked.rows)
        if refusal := scorer.refusal(method, asked.rows):
            found[method] = Row(method, refused=refusal)
            continue
        batches = in_batches(method, asked.rows, config.batch_size)
        missing = set(file.missing(method, batches))
        for i, batch in enumerate(batches):
            if i in missing:
                rows = [asked.rows[question] for question in batch]
                limits = [asked.limits[question] for question in batch]
                questions = [asked.questions.items[question] for question in batch]
                file.add(method, batch, questions, scorer.score(method, rows, limits))
            done += len(batch)
            progress(done)
        found[method] = row_of(method, asked.questions, file.of(method))
    return found


def _ask(config: EvaluateConfig, tokenizer: Any, layout: Layout, bar: Bar) -> _Asked:
    """The questions, and what is made of them before any model is loaded."""

    def count(example: Example) -> int:
        return len(tokenize(tokenizer, replace(example, answer=None), layout).prompt_ids)

    if config.task == RECALL:
        questions = recall_questions(config, count, bar)
    else:
        questions = load_questions(config, bar)
    kept, rows, problem = [], [], ""
    progress = bar("Tokenizing")
    for i, question in enumerate(questions.items):
        try:
            rows.append(_compact(tokenize(tokenizer, question.example, layout)))
        except KMergeError as error:
            problem = f"{questions.where(i)}: {error}"
            if not config.skip_bad:
                raise EvaluateError(problem) from error
        else:
            kept.append(question)
        progress(i + 1, len(questions.items))
    if not rows:
        raise EvaluateError(f"no question is left: {problem}")
    bad = questions.bad + len(questions.items) - len(kept)
    questions = replace(questions, items=kept, bad=bad)
    return _Asked(questions, rows, _limits(config, questions, rows))


def _compact(row: TokenizedExample) -> TokenizedExample:
    """A row whose prompt takes 4 bytes a token."""
    return replace(row, segments=[Segment(array("i", s.ids), s.merge) for s in row.segments])


def _limits(
    config: EvaluateConfig, questions: Questions, rows: Sequence[TokenizedExample]
) -> list[int]:
    """Most tokens of each answer: what its group's longest right one has, without its end.

    So labels are told by their first tokens, as in the paper, and no answer costs more than it can
    be worth.
    """
    longest: dict[str, int] = {}
    for question, row in zip(questions.items, rows, strict=True):
        size = len(row.answer_ids) - 1
        longest[question.group] = max(longest.get(question.group, 1), size)
    more = {group.name: MORE_TOKENS if group.anywhere else 0 for group in questions.groups}
    return [config.max_tokens or longest[q.group] + more[q.group] for q in questions.items]


def _identity(
    config: EvaluateConfig,
    methods: Sequence[Method],
    folder: Path,
    asked: _Asked,
    layout: Layout,
) -> dict[str, str]:
    """What answers depend on, by name: files by their digest, and the settings."""
    digest = hashlib.sha256()
    for question, row in zip(asked.questions.items, asked.rows, strict=True):
        prompt = [[segment.merge, *segment.ids] for segment in row.segments]
        about = [question.group, question.answer, prompt, row.answer_ids]
        digest.update(json.dumps(about).encode() + b"\n")
    identity = {
        "the base model": base.weights_digest(folder),
        "the questions": digest.hexdigest(),
        "--batch-size": str(config.batch_size),
        "--max-tokens": str(config.max_tokens),
        "the chat template": "used" if layout.chat_template else "unused",
    }
    have = adapters(config)
    for k in sorted({method.adapter_k for method in methods}):
        digest = _digest(adapter_folder(config.adapter_path, k)) if k in have else "none"
        identity[f"the adapter for K={k}"] = digest
    return identity


def _digest(adapter: Path) -> str:
    """SHA-256 of an adapter's files."""
    digest = hashlib.sha256()
    for name in FILES:
        with (adapter / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
