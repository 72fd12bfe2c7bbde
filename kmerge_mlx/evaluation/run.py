"""Runs an evaluation: questions, then each model and its methods, then the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import mlx.nn as nn

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import ENCODER, FILES, carried_by, load_adapter
from kmerge_mlx.adapters.schema import LoRAConfig, MergeConfig
from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.layout import TokenizedExample, prompt_segments, tokenize
from kmerge_mlx.data.tasks import Bar
from kmerge_mlx.errors import EvaluateError, KMergeError, PromptError
from kmerge_mlx.evaluation.baselines import BASELINES, METHODS, Base, Merged, Method, Uncompressed
from kmerge_mlx.evaluation.baselines.method import ALONE
from kmerge_mlx.evaluation.questions import Questions, load_questions, recall_questions
from kmerge_mlx.evaluation.recommend import check, recommend
from kmerge_mlx.evaluation.report import Report, Row, make_report, row_of
from kmerge_mlx.evaluation.scoring import DATE, PredictionsFile, Scorer, stored_date
from kmerge_mlx.evaluation.settings import ALL, BUDGET, RECALL, TEXT, TREE, EvaluateSettings
from kmerge_mlx.generation.cost import Spread, kv_bytes_at
from kmerge_mlx.generation.stream import check_context
from kmerge_mlx.model import load_source, wire
from kmerge_mlx.prompts.chat_template import needs_template, now
from kmerge_mlx.prompts.policy import Layout, chosen
from kmerge_mlx.prompts.segments import merged_text
from kmerge_mlx.source import Source, refuse_unknown
from kmerge_mlx.train.rows import by_length

MORE_TOKENS = 8  # an answer that has to contain the right one may be so much longer
Sources = Mapping[int, Source]
"""The base with the adapter for each merge factor, and the base alone (``ALONE``).

It is the base alone for 1, too, if there is no adapter for it.
"""

Timed = Mapping[str, tuple[int, ...]]
"""The questions whose time is measured, by group; groups that differ in depth alone share them."""


def evaluate(settings: EvaluateSettings, bar: Bar) -> Report:
    """Measures what the settings ask for."""
    sources, methods = _sources(settings)
    unnamed = settings.model is None and settings.adapter_path is None
    own = next(iter(sources.values()))
    settings = replace(
        settings,
        model=own.model,
        adapter_path=own.adapter_path,
        haystack=settings.haystack or (TREE if own.model == BUNDLED else TEXT),
    )
    tokenizer = base.read_tokenizer(
        own.path, base.read_config(own.path), own.model, own.trust_remote_code
    )
    needs_template(tokenizer, settings.chat_template)
    layout, date = _layout(settings, sources), stored_date(settings.predictions) or now(tokenizer)
    templated = layout.chat_template and tokenizer.has_chat_template
    layout = replace(layout, chat_template=templated, date=date if templated else None)
    questions = _questions(settings, tokenizer, layout, bar)
    if settings.recommend:
        check(questions, methods, settings.recommend_by)
    if unnamed:
        refuse_unknown(tokenizer.decode(questions.items[0].row.prompt_ids))
    size, identity = len(questions.items), {}
    if settings.predictions is not None:
        identity = _identity(settings, sources, questions, layout)
    file = PredictionsFile(settings.predictions, identity, size)
    show, done, total = bar("Evaluating"), 0, len(methods) * size

    def progress(more: int) -> None:
        nonlocal done
        done += more
        show(done, total)

    timed = _timed(questions, settings.timed)
    found: dict[Method, Row] = {}
    for k, source in sources.items():
        mine = [method for method in methods if method.adapter_k == k]
        asked = (questions, layout, timed, file, settings.batch_size)
        found |= _measured(source, mine, *asked, progress)
    show(total, total)
    report = make_report(settings, questions, layout, [found[method] for method in methods])
    if not settings.recommend:
        return report
    answers = {method: file.of(method) for method, row in found.items() if row.refused is None}
    budget = BUDGET if settings.budget is None else settings.budget
    recommended = recommend(questions, answers, settings.recommend_by, budget)
    return replace(report, recommended=recommended)


def _sources(settings: EvaluateSettings) -> tuple[Sources, list[Method]]:
    """Finds the base and the adapters, and decides what to measure with them."""
    names, trust = (settings.model, settings.adapter_path), settings.trust_remote_code
    found = {s.k: s for s in Source.find_all(*names, settings.k, trust, needed=False)}
    first = next(iter(found.values()))
    adapted = first.adapter_path is not None
    methods = wanted(settings, [*found] if adapted else sorted({*settings.k} or {1}), adapted)
    found[ALONE] = replace(first, adapter=None, merge=None)
    needed = sorted({method.adapter_k for method in methods})
    if 1 in needed and 1 not in found:
        (found[1],) = Source.find_all(*names, (1,), trust)
    carried = carried_by(first.path)
    alone = Base(1, carried is not None and not load_adapter(carried).tuning_weights)
    methods = [alone if isinstance(m, Base) else m for m in methods]
    if 1 in found and found[1].adapter is None:  # then `uncompressed` is the base
        methods = [Uncompressed(1, alone) if isinstance(m, Uncompressed) else m for m in methods]
        if {alone, Uncompressed(1, alone)} <= {*methods}:
            methods.remove(alone)
            needed.remove(ALONE)
    return {k: found[k] for k in needed}, methods


def wanted(settings: EvaluateSettings, ks: Sequence[int], adapted: bool) -> list[Method]:
    """The methods to measure at these merge factors, in the order in which they are shown.

    Without adapters (``adapted``) only those are left that need no encoder.
    """
    plain = {Uncompressed: None} if 1 in ks else {}
    plain |= {METHODS[n]: None for n in settings.baselines if not METHODS[n].compresses}
    names = [name for name in settings.baselines if METHODS[name].compresses]
    if names and max(ks) == 1:
        raise EvaluateError(f"`baseline` {names[0]} has the budget of merging: give `k` above 1")
    kinds = [METHODS[name] for name in (Merged.name, *names)]
    if not adapted and max(ks) > 1:
        kinds = [kind for kind in kinds if not kind.encodes]
        lacking = [name for name in settings.baseline if name != ALL and METHODS[name].encodes]
        if lacking or not kinds:
            what = f"`baseline` {lacking[0]} needs one" if lacking else f"`k` is {max(ks)}"
            usable = [n for n in BASELINES if METHODS[n].compresses and not METHODS[n].encodes]
            raise EvaluateError(
                f"{what}, and there is no merge encoder: give `adapter_path`, or compare only "
                f"`baseline` {', '.join(usable)}"
            )
    return [kind(1) for kind in plain] + [kind(k) for k in ks if k > 1 for kind in kinds]


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
    asked = (settings.merges, settings.merge_threshold, settings.chat_template, settings.keep)
    found = {chosen(layout, *asked) for layout in stored}
    if len(found) > 1:
        ks = ", ".join(str(k) for k, source in sources.items() if source.merge)
        raise EvaluateError(
            f"the adapters for K = {ks} were trained on prompts laid out differently: measure one "
            "`k` at a time, or give `merges`, `merge_threshold`, `chat_template` and `keep`"
        )
    return found.pop()


def _measured(
    source: Source,
    methods: Sequence[Method],
    questions: Questions,
    layout: Layout,
    timed: Timed,
    file: PredictionsFile,
    batch_size: int,
    progress: Callable[[int], None],
) -> dict[Method, Row]:
    """The scores of methods that read with one model, which is gone from memory afterwards."""
    model, tokenizer = reader(source)
    scorer = Scorer(model, tokenizer, batch_size)
    kv_bytes, found = kv_bytes_at(model), {}
    for method in methods:
        rows = _rows(questions, tokenizer, layout, method)
        try:
            method.prepare(model)
            for row in rows:
                check_context(model, method.longest(model, row.segments))
            # Not every method knows its way with every model.
            method.read(model, max(rows, key=lambda row: row.num_tokens).segments)
        except PromptError as error:
            found[method] = Row(method.name, method.k, method.label, refused=str(error))
            continue
        for batch in by_length(rows, batch_size, method.k):
            if not file.has(method, batch):
                asked = [questions.items[i] for i in batch]
                limits = [questions.limits[question.group] for question in asked]
                predictions = scorer.score(method, [rows[i] for i in batch], limits)
                file.add(method, batch, asked, predictions)
            progress(len(batch))
        answers = file.of(method)
        sizes: dict[str, list[int]] = {}
        for question, answer in zip(questions.items, answers, strict=True):
            sizes.setdefault(question.group, []).append(kv_bytes(answer.positions))
        found[method] = replace(
            row_of(method, questions, answers),
            kv_bytes={group: mean(each) for group, each in sizes.items()},
            time_to_first_token=_times(scorer, method, rows, timed),
        )
    return found


def _timed(questions: Questions, count: int) -> Timed:
    """Chooses the questions to time: so many prompts of each group, spread over the lengths."""
    kind_of = {
        group.name: group.place[0] if group.place else group.name for group in questions.groups
    }
    kinds: dict[Any, list[int]] = {}
    order = sorted(range(len(questions.items)), key=lambda i: questions.items[i].row.num_tokens)
    for i in order:
        kinds.setdefault(kind_of[questions.items[i].group], []).append(i)

    def spread(mine: Sequence[int]) -> tuple[int, ...]:
        parts = min(count, len(mine))  # the middle of as many equal parts
        return tuple(mine[(2 * part + 1) * len(mine) // (2 * parts)] for part in range(parts))

    return {group: spread(kinds[kind]) for group, kind in kind_of.items() if count}


def _rows(
    questions: Questions, tokenizer: Any, layout: Layout, method: Method
) -> list[TokenizedExample]:
    """What a method is asked; what it merges is laid out anew where the encoder tokenizes it."""
    items = questions.items
    if merged_text(tokenizer) is None or not method.encodes:
        return [question.row for question in items]
    return [replace(q.row, segments=prompt_segments(tokenizer, q.example, layout)) for q in items]


def _times(
    scorer: Scorer, method: Method, rows: Sequence[TokenizedExample], timed: Timed
) -> dict[str, Spread]:
    """Seconds to the first token of the timed questions, by group, after one that warms up."""
    found = {}
    for mine in dict.fromkeys(timed.values()):
        if not found:
            scorer.seconds(method, rows[mine[0]].segments)
        found[mine] = Spread.of(scorer.seconds(method, rows[i].segments) for i in mine)
    return {group: found[mine] for group, mine in timed.items()}


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
        limits[group.name] = longest if settings.max_tokens is None else settings.max_tokens
    return limits


def _identity(
    settings: EvaluateSettings, sources: Sources, questions: Questions, layout: Layout
) -> dict[str, tuple[str, ...]]:
    """What answers depend on, by name: files by their digest (and the older one), and settings."""
    digest = hashlib.sha256()
    for question in questions.items:
        prompt = [[segment.merge, *segment.ids] for segment in question.row.segments]
        group = question.group if settings.task else "data"  # whatever the folder is called
        about = [group, question.answer, prompt, [*question.row.answer_ids]]
        digest.update(json.dumps(about).encode() + b"\n")
    path = next(iter(sources.values())).path
    identity = {
        "the base model": base.digests(path),
        "the questions": (digest.hexdigest(),),
        "--batch-size": (str(settings.batch_size),),
        "--max-tokens": (str(settings.max_tokens),),
        "the chat template": ("used" if layout.chat_template else "unused",),
    }
    identity |= {DATE: (layout.date,)} if layout.date else {}
    for k, source in sources.items():
        digest = hashlib.sha256()
        for name in FILES if source.adapter else ():
            with (source.adapter / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        if source.merge is not None and source.merge.has_window:
            digest.update(base.digests(source.adapter / ENCODER)[0].encode())
        if k != ALONE:
            known = digest.hexdigest() if source.adapter else "none"
            identity[f"the adapter for K={k}"] = (known,)
    return identity
