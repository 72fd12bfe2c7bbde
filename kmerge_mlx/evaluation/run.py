"""Runs an evaluation: questions, then each model and its methods, then the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.nn as nn

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import FILES
from kmerge_mlx.adapters.schema import LoRAConfig, MergeConfig
from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.layout import tokenize
from kmerge_mlx.data.tasks import Bar
from kmerge_mlx.errors import EvaluateError, KMergeError, PromptError
from kmerge_mlx.evaluation.questions import Questions, load_questions, recall_questions
from kmerge_mlx.evaluation.report import Report, Row, make_report, row_of
from kmerge_mlx.evaluation.scoring import Method, PredictionsFile, Scorer
from kmerge_mlx.evaluation.settings import (
    MERGED,
    RECALL,
    TEXT,
    TREE,
    UNCOMPRESSED,
    EvaluateSettings,
)
from kmerge_mlx.generation.stream import check_context
from kmerge_mlx.model import load_source, wire
from kmerge_mlx.prompts.lay_out import Layout, chosen
from kmerge_mlx.source import Source
from kmerge_mlx.train.rows import by_length

MORE_TOKENS = 8  # an answer that has to contain the right one may be so much longer
Sources = Mapping[int, Source]
"""The base with the adapter for each merge factor; the base alone for 1 if there is none."""


def evaluate(settings: EvaluateSettings, bar: Bar) -> Report:
    """Measures what the settings ask for."""
    names, trust = (settings.model, settings.adapter_path), settings.trust_remote_code
    sources = {source.k: source for source in Source.find_all(*names, settings.k, trust)}
    methods = wanted(settings, [*sources])
    sources = {
        k: sources.get(k) or Source.find_all(*names, (k,), trust)[0]
        for k in sorted({method.adapter_k for method in methods})
    }
    own = next(iter(sources.values()))
    settings = replace(
        settings,
        model=own.model,
        adapter_path=own.adapter_path,
        haystack=settings.haystack or (TREE if own.model == BUNDLED else TEXT),
    )
    tokenizer = base.read_tokenizer(own.path, base.read_config(own.path), own.model, trust)
    layout = _layout(settings, sources)
    layout = replace(layout, chat_template=layout.chat_template and tokenizer.has_chat_template)
    questions = _questions(settings, tokenizer, layout, bar)
    identity, size = _identity(settings, sources, questions, layout), len(questions.items)
    file = PredictionsFile(settings.predictions, identity, size)
    show, done, total = bar("Evaluating"), 0, len(methods) * size

    def progress(more: int) -> None:
        nonlocal done
        done += more
        show(done, total)

    found: dict[Method, Row] = {}
    for k, source in sources.items():
        mine = [method for method in methods if method.adapter_k == k]
        found |= _measured(source, mine, questions, file, settings.batch_size, progress)
    show(total, total)
    return make_report(settings, questions, layout, [found[method] for method in methods])


def wanted(settings: EvaluateSettings, ks: Sequence[int]) -> list[Method]:
    """The methods to measure at these merge factors, in the order in which they are shown."""
    names = [MERGED, *(n for n in settings.baselines if n != UNCOMPRESSED)]
    if len(names) > 1 and max(ks) == 1:
        raise EvaluateError(f"`baseline` {names[1]} has the budget of merging: give `k` above 1")
    plain = [Method(UNCOMPRESSED, 1)] if 1 in ks or UNCOMPRESSED in settings.baselines else []
    return plain + [Method(name, k) for k in ks if k > 1 for name in names]


def reader(source: Source) -> tuple[nn.Module, Any]:
    """Loads the model that methods read with, and its tokenizer; its embedding is wrapped."""
    model, tokenizer, _ = load_source(source)
    if source.adapter is None:
        wire(model, MergeConfig(None), LoRAConfig(0), 0, source.model)
        model.eval()
    return model, tokenizer


def _layout(settings: EvaluateSettings, sources: Sources) -> Layout:
    """How prompts are laid out: alike for all that is compared, as the adapters were trained."""
    stored = {source.merge.layout for source in sources.values() if source.merge} or {None}
    asked = (settings.merges, settings.merge_threshold, settings.chat_template)
    found = {chosen(layout, *asked) for layout in stored}
    if len(found) > 1:
        ks = ", ".join(str(k) for k, source in sources.items() if source.merge)
        raise EvaluateError(
            f"the adapters for K = {ks} were trained on prompts laid out differently: measure one "
            "`k` at a time, or give `merges`, `merge_threshold` and `chat_template`"
        )
    return found.pop()


def _measured(
    source: Source,
    methods: Sequence[Method],
    questions: Questions,
    file: PredictionsFile,
    batch_size: int,
    progress: Callable[[int], None],
) -> dict[Method, Row]:
    """The scores of methods that read with one model, which is gone from memory afterwards."""
    model, tokenizer = reader(source)
    scorer, rows = Scorer(model, tokenizer, batch_size), [q.row for q in questions.items]
    found = {}
    for method in methods:
        method.prepare(model)
        cut = [replace(row, segments=method.cut(row.segments)) for row in rows]
        try:
            for row in cut:
                check_context(model, row.segments)
        except PromptError as error:
            found[method] = Row(method.name, method.k, method.label, refused=str(error))
            continue
        for batch in by_length(cut, batch_size, method.k):
            if not file.has(method, batch):
                asked = [questions.items[i] for i in batch]
                sizes = [len(question.row.prompt_ids) for question in asked]
                limits = [questions.limits[question.group] for question in asked]
                predictions = scorer.score([cut[i] for i in batch], sizes, limits)
                file.add(method, batch, asked, predictions)
            progress(len(batch))
        found[method] = row_of(method, questions, file.of(method))
    return found


def _questions(settings: EvaluateSettings, tokenizer: Any, layout: Layout, bar: Bar) -> Questions:
    """The questions, tokenized."""

    def count(example: Example) -> int:
        return len(tokenize(tokenizer, replace(example, answer=None), layout).prompt_ids)

    if settings.task == RECALL:
        questions = recall_questions(settings, count, bar)
    else:
        questions = load_questions(settings, bar)
    kept, problem = [], ""
    progress = bar("Tokenizing")
    for i, question in enumerate(questions.items):
        try:
            row = tokenize(tokenizer, question.example, layout)
        except KMergeError as error:
            problem = f"{questions.where(i)}: {error}"
            if not settings.skip_bad:
                raise EvaluateError(problem) from error
        else:
            kept.append(replace(question, row=row.packed()))
        progress(i + 1, len(questions.items))
    if not kept:
        raise EvaluateError(f"no question is left: {problem}")
    bad = questions.bad + len(questions.items) - len(kept)
    questions = replace(questions, items=kept, bad=bad)
    return replace(questions, limits=_limits(settings, questions))


def _limits(settings: EvaluateSettings, questions: Questions) -> dict[str, int]:
    """Most tokens of an answer: as many as its group's longest right one, without its end.

    So a label is recognised by its first tokens, as in the paper.
    """
    limits: dict[str, int] = {}
    for group in questions.groups:
        sizes = [len(q.row.answer_ids) - 1 for q in questions.items if q.group == group.name]
        longest = max([1, *sizes]) + (MORE_TOKENS if group.anywhere else 0)
        limits[group.name] = settings.max_tokens or longest
    return limits


def _identity(
    settings: EvaluateSettings, sources: Sources, questions: Questions, layout: Layout
) -> dict[str, str]:
    """What answers depend on, by name: files by their digest, and settings."""
    digest = hashlib.sha256()
    for question in questions.items:
        prompt = [[segment.merge, *segment.ids] for segment in question.row.segments]
        about = [question.group, question.answer, prompt, [*question.row.answer_ids]]
        digest.update(json.dumps(about).encode() + b"\n")
    path = next(iter(sources.values())).path
    identity = {
        "the base model": base.weights_digest(path),
        "the questions": digest.hexdigest(),
        "--batch-size": str(settings.batch_size),
        "--max-tokens": str(settings.max_tokens),
        "the chat template": "used" if layout.chat_template else "unused",
    }
    for k, source in sources.items():
        digest = hashlib.sha256()
        for name in FILES if source.adapter else ():
            with (source.adapter / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        identity[f"the adapter for K={k}"] = digest.hexdigest() if source.adapter else "none"
    return identity
