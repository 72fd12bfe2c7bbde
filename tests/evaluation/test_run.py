"""What a model answers and how likely it finds the right answer, against mlx-lm and by hand."""

from __future__ import annotations

import itertools
import json
import math
import weakref
from dataclasses import replace

import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.tuner.datasets import CacheDataset, CompletionsDataset
from mlx_lm.tuner.trainer import evaluate as host_evaluate

from kmerge_mlx import generate, load
from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.data.examples import RowFormat
from kmerge_mlx.data.layout import tokenize
from kmerge_mlx.errors import EvaluateError, SettingsError
from kmerge_mlx.evaluation import run as session
from kmerge_mlx.evaluation import scoring
from kmerge_mlx.evaluation.baselines import BASELINES, METHODS
from kmerge_mlx.evaluation.report import read_report
from kmerge_mlx.plots.evaluation import draw_report
from kmerge_mlx.prompts.lay_out import Layout
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.train import rows as train_rows
from tests.cli_runner import CHATML, copy_base
from tests.evaluation.by_hand import by_hand
from tests.evaluations import (
    QUESTIONS,
    TEMPLATE,
    Folders,
    answers_of,
    labelled,
    measured,
    questions_of,
    write_data,
)
from tests.tiny import build, qwen2_config, random_adapter, write_base

WEIGHING = ("selective-context", "spec-prefill")
MAX_TOKENS = 4


@pytest.fixture(scope="module")
def batched(tmp_path_factory, folders, data):
    """Every method's answers, 8 at a time, and the report."""
    file = tmp_path_factory.mktemp("batched") / "answers.jsonl"
    settings = folders.settings(k=(2, 4), baseline=BASELINES, data=str(data), batch_size=8)
    report = measured(**settings, max_tokens=MAX_TOKENS, predictions=str(file))
    return answers_of(file), report


def host_perplexity(model: nn.Module, tokenizer, rows: list[dict]) -> float:
    """By ``mlx_lm.tuner``, with ``mask_prompt``.

    mlx-lm pads a row, and counts the first padding token as a target; a row that is as long as
    ``max_seq_length`` is not padded.
    """
    nll = tokens = 0
    for row in rows:
        made = CompletionsDataset([row], tokenizer, "prompt", "completion", mask_prompt=True)
        ids, offset = made.process(row)
        loss = host_evaluate(model, CacheDataset(made), 1, -1, max_seq_length=len(ids))
        nll, tokens = nll + loss * (len(ids) - offset), tokens + len(ids) - offset
    return math.exp(nll / tokens)


@pytest.mark.parametrize("adapted", [False, True])
def test_perplexity_uncompressed_is_mlx_lms(tmp_path, folders, adapted):
    base = copy_base(folders.base, tmp_path / "base", TEMPLATE)
    rows = [{k: row[k] for k in ("prompt", "completion")} for row in questions_of(12, seed=1)]
    adapter = str(folders.adapters / "k1") if adapted else None
    settings = {"data": str(write_data(tmp_path / "data", rows)), "max_tokens": 1, "batch_size": 5}
    report = measured(model=str(base), adapter_path=adapter, **settings)
    assert report.layout["chat_template"]
    found = report.rows[0].scores["data"]["perplexity"].value
    assert found == pytest.approx(
        host_perplexity(*mlx_lm.load(str(base), adapter_path=adapter), rows), rel=1e-5
    )


READ = [("uncompressed", 1), ("base", 1)] + [
    (name, k) for k in (2, 4) for name, method in METHODS.items() if method.compresses
]


@pytest.mark.parametrize(("method", "k"), READ)
def test_each_method_reads_what_its_name_says(folders, rows, batched, method, k):
    assert set(batched[0]) == set(READ)
    for number in (0, 1, 2, 9):  # with a raw part, and without
        row = rows[number]
        nll, positions = by_hand(folders, row, method, k)
        line = batched[0][method, k][number]
        assert line["nll"] == pytest.approx(nll, abs=1e-3)
        assert (line["positions"], line["prompt_tokens"]) == (positions, len(row.prompt_ids))
        assert line["answer_tokens"] == len(row.answer_ids)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization": {"group_size": 32, "bits": 4}},
        {"model_type": "llama", "tie_word_embeddings": False},
    ],
    ids=["quantized", "llama"],
)
def test_other_models_are_read_as_well_and_an_encoder_with_context(tmp_path, config):
    base = write_base(tmp_path / "base", qwen2_config(**config))
    adapter = random_adapter(load(str(base))[0], 3, context=2)
    save_adapter(adapter, tmp_path / "adapter")
    folders, file = Folders(base, tmp_path / "adapter"), tmp_path / "answers.jsonl"
    rows = questions_of(3)
    data = str(write_data(tmp_path / "data", rows))
    measured(**folders.settings(baseline=BASELINES, data=data), max_tokens=1, predictions=str(file))
    found, tokenizer = answers_of(file), load(str(base))[1]
    names = METHODS.keys() - {"base"}  # without an adapter for K = 1, `uncompressed` is the base
    assert set(found) == {(n, 3 if METHODS[n].compresses else 1) for n in names}
    for number, row in enumerate(rows):
        example = tokenize(tokenizer, RowFormat().read(row))
        for method in ("merged", "mean"):
            nll, _ = by_hand(folders, example, method, 3)
            assert found[method, 3][number]["nll"] == pytest.approx(nll, rel=1e-4)


def test_the_answers_are_those_of_generate(folders, rows, batched):
    model, tokenizer = load(str(folders.base), folders.adapters, 4)
    for number in range(8):
        text = generate(model, tokenizer, rows[number].segments, max_tokens=MAX_TOKENS)
        assert batched[0]["merged", 4][number]["text"] == text != ""


@pytest.mark.slow
def test_one_by_one_the_answers_are_the_same(tmp_path, folders, data, batched):
    file = tmp_path / "answers.jsonl"
    settings = folders.settings(k=(4,), baseline=BASELINES, data=str(data), batch_size=1)
    measured(**settings, max_tokens=MAX_TOKENS, predictions=str(file))
    found = answers_of(file)
    assert {method for method, _ in found} == {"merged", *BASELINES}
    for method, lines in found.items():
        together = batched[0][method]
        assert [line["text"] for line in lines] == [line["text"] for line in together]
        nll = [line["nll"] for line in together]
        assert [line["nll"] for line in lines] == pytest.approx(nll, abs=1e-4)


def test_a_cut_prompt_has_the_budget_of_merging_and_keeps_what_is_raw():
    for method, k, size in itertools.product(("truncate", "stride"), (2, 3, 5), range(1, 30)):
        ids, raw = list(range(size)), list(range(100, 100 + size))
        segments = [Segment(raw, False), Segment(ids), Segment([7], False), Segment(ids)]
        before, first, between, second = METHODS[method](k).read(None, segments)
        assert (list(before.ids), list(between.ids)) == (raw, [7])
        assert len(first.ids) == math.ceil(size / k)
        assert not any(part.merge for part in (before, first, between, second))
        expected = ids[-len(first.ids) :] if method == "truncate" else [*ids[k - 1 :: k], size - 1]
        assert list(first.ids) == list(second.ids) == sorted(set(expected))


def test_uncompressed_is_the_base_where_there_is_no_adapter_for_1(tmp_path, folders, data, batched):
    asked = {"model": str(folders.base), "data": str(data), "limit": 8, "max_tokens": 1}
    k4 = str(folders.adapters / "k4")
    report = measured(**asked, adapter_path=k4, baseline=("uncompressed",))
    alone = measured(**asked)
    first, second = report.rows
    assert [(row.method, row.k) for row in report.rows] == [("uncompressed", 1), ("merged", 4)]
    assert first == alone.rows[0] != second
    adapted = batched[0]["uncompressed", 1][:8]
    nll, tokens = (sum(line[name] for line in adapted) for name in ("nll", "answer_tokens"))
    assert first.scores["data"]["perplexity"].value != pytest.approx(math.exp(nll / tokens), 1e-3)


def test_an_answer_ends_where_the_base_ends_and_is_as_long_as_the_longest_right_one(
    tmp_path, monkeypatch, folders
):
    """ChatML's end is one of the base's, and only its config says so."""
    base = copy_base(folders.base, tmp_path / "base", CHATML, eos_token_id=[2, 0])
    data = write_data(tmp_path / "data", labelled(["true", "one two three", "false"]))
    lengths, limits, plain = [], [], scoring.Scorer.score

    def score(self, method, rows, max_tokens):
        lengths.extend(len(row.answer_ids) for row in rows)
        assert {row.answer_ids[-1] for row in rows} == {2}
        limits.extend(max_tokens)
        return plain(self, method, rows, max_tokens)

    monkeypatch.setattr(scoring.Scorer, "score", score)
    measured(model=str(base), data=str(data))
    assert (len(set(lengths)), limits) == (2, [max(lengths) - 1] * 3)
    lengths.clear()
    limits.clear()
    measured(model=str(base), task="recall", length=(500,), depth=(1,), num_needles=2)
    assert limits == [max(lengths) - 1 + 8] * 2


def test_without_its_chat_template_a_base_reads_the_bare_text(tmp_path, folders, data):
    """If it is left out, or if an adapter was trained so: then all that is compared is read so."""
    settings = {"data": str(data), "limit": 4, "max_tokens": 1}
    base = str(copy_base(folders.base, tmp_path / "base", TEMPLATE))
    adapter = random_adapter(build(qwen2_config()), 4, seed=4)
    plain = replace(adapter, merge=replace(adapter.merge, layout=Layout(chat_template=False)))
    save_adapter(plain, tmp_path / "plain")
    templated = folders.settings(model=base, k=(4,), baseline=("uncompressed",), **settings)
    reports = [
        measured(**templated),
        measured(**templated, chat_template=False),
        measured(**templated | {"adapter_path": str(tmp_path / "plain")}),
    ]
    bare = measured(**templated | {"model": str(folders.base)})
    assert [report.layout["chat_template"] for report in reports] == [True, False, False]
    assert reports[1].rows == bare.rows
    tokens = [[row.sizes["data"][0] for row in report.rows] for report in reports]
    assert tokens[0][0] == tokens[0][1] > tokens[1][0] == tokens[1][1] == tokens[2][0]


@pytest.mark.parametrize(("limit", "most"), [("MOST_LOGITS", 700 * 20), ("MOST_READ", 60)])
def test_long_answers_are_likely_alike_however_little_is_held(
    monkeypatch, folders, data, batched, limit, most
):
    monkeypatch.setattr(train_rows, limit, most)
    sizes, plain = [], scoring.answer_logits

    answers, asked = scoring.batch_generate, []

    def logits(model, batch, cache):
        sizes.append(batch.targets.size)
        return plain(model, batch, cache)

    def answer(model, tokenizer, prompts, **options):
        asked.append((len(prompts), max(len(prompt.ids) for prompt in prompts)))
        return answers(model, tokenizer, prompts, **options)

    monkeypatch.setattr(scoring, "answer_logits", logits)
    monkeypatch.setattr(scoring, "batch_generate", answer)
    report = measured(**folders.settings(k=(4,), data=str(data)), max_tokens=1)
    wanted = next(row for row in batched[1].rows if (row.method, row.k) == ("merged", 4))
    found = report.rows[0].scores["data"]["perplexity"].value
    assert found == pytest.approx(wanted.scores["data"]["perplexity"].value, rel=1e-5)
    assert len(sizes) > 4
    assert max(sizes) <= 32
    assert len(asked) == len(sizes)
    if limit == "MOST_READ":
        assert all(count == 1 or count * longest <= 60 for count, longest in asked)


def test_long_prompts_are_likely_alike_read_in_steps(monkeypatch, folders, data, batched):
    monkeypatch.setattr(scoring, "STEP", 4)
    widths, plain = [], scoring.answer_logits

    def logits(model, batch, cache):
        widths.append((batch.ids.shape[1], cache is not None))
        return plain(model, batch, cache)

    monkeypatch.setattr(scoring, "answer_logits", logits)
    settings = folders.settings(k=(4,), data=str(data))
    report = measured(**settings, max_tokens=1, batch_size=2)
    wanted = next(row for row in batched[1].rows if (row.method, row.k) == ("merged", 4))
    found = report.rows[0].scores["data"]["perplexity"].value
    assert found == pytest.approx(wanted.scores["data"]["perplexity"].value, rel=1e-5)
    assert any(with_cache for _, with_cache in widths)


def test_without_answers_there_is_perplexity_alone(monkeypatch, tmp_path, folders, data, batched):
    monkeypatch.delattr(scoring, "batch_generate")
    settings = folders.settings(k=(2, 4), baseline=BASELINES, data=str(data), batch_size=8)
    report = measured(**settings, max_tokens=0)
    for found, wanted in zip(report.rows, batched[1].rows, strict=True):
        perplexity = wanted.scores["data"]["perplexity"]
        assert found.scores == {"data": {"perplexity": perplexity}}
    draw_report(report, tmp_path / "plot.png")
    asked = settings | {"max_tokens": 0}
    measured(**asked, recommend=True, recommend_by="perplexity")
    for more, said in (
        ({"recommend": True}, "no answer is written: give `recommend_by` perplexity"),
        ({"task": "recall", "data": None}, "no answer is written, and recall is scored by answers"),
    ):
        with pytest.raises(SettingsError, match=f"`max_tokens` is 0, so {said}"):
            measured(**asked | more)


def test_one_model_at_a_time_is_in_memory(monkeypatch, folders, data):
    models = []
    plain = session.reader

    def watched(*args):
        assert [model() for model in models] == [None] * len(models)
        model, tokenizer = plain(*args)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(session, "reader", watched)
    measured(**folders.settings(baseline=("mean",), data=str(data), limit=4), max_tokens=1)
    assert len(models) == 3


def test_a_right_answer_is_known_without_writing_it_where_it_is_the_likeliest(
    monkeypatch, tmp_path
):
    answers, prompts = [], []
    write, score = scoring.batch_generate, scoring.Scorer._right_answers

    def watched(model, tokenizer, given, **options):
        prompts[-1] += len(given)
        return write(model, tokenizer, given, **options)

    def unseen(self, read):
        nll, likeliest = score(self, read)
        return nll, [False] * len(likeliest)

    monkeypatch.setattr(scoring, "batch_generate", watched)
    for patched in (score, unseen):
        monkeypatch.setattr(scoring.Scorer, "_right_answers", patched)
        file = tmp_path / f"{len(answers)}.jsonl"
        prompts.append(0)
        asked = {"task": "textualized-tree", "num_trees": 8, "k": (4,), "baseline": ("truncate",)}
        measured(**asked, predictions=str(file))
        answers.append(answers_of(file))
    assert answers[0] == answers[1]
    assert prompts[1] == 48
    assert prompts[0] < 24


def test_a_likelihood_that_cannot_be_computed_is_null_in_the_report(monkeypatch, folders, data):
    unknown = [math.nan] * 4, [False] * 4
    monkeypatch.setattr(scoring.Scorer, "_right_answers", lambda self, read: unknown)
    report = measured(**folders.settings(k=(4,), data=str(data), limit=4), max_tokens=1)
    score = report.to_json()["rows"][0]["scores"]["data"]["perplexity"]
    assert score == {"value": None}


def test_adapters_trained_on_other_layouts_are_measured_one_at_a_time(tmp_path, folders, data):
    for k, layout in ((2, Layout(merges="all")), (4, Layout())):
        adapter = random_adapter(build(qwen2_config()), k, seed=k)
        save_adapter(
            replace(adapter, merge=replace(adapter.merge, layout=layout)), tmp_path / f"k{k}"
        )
    settings = folders.settings(adapter_path=str(tmp_path), data=str(data), limit=2, max_tokens=1)
    with pytest.raises(EvaluateError, match="K = 2, 4 were trained on prompts laid out differ"):
        measured(**settings)
    assert len(measured(**settings, merges="all", merge_threshold=9).rows) == 2
    assert measured(**settings, k=(2,)).layout["merges"] == "all"


def test_a_report_is_read_back_as_it_was_printed(tmp_path, batched):
    path, report = tmp_path / "report.json", batched[1]
    path.write_text(json.dumps(report.to_json()))
    found = read_report(path)
    assert (found.version, found.settings["task"]) == (report.version, None)
    assert found.groups == report.groups == {"data": QUESTIONS}
    assert [row.scores for row in found.rows] == [row.scores for row in report.rows]
    ratios = [row.compression_ratio for row in report.rows]
    assert [row.compression_ratio for row in found.rows] == ratios
    assert [row.kv_bytes for row in found.rows] == [row.kv_bytes for row in report.rows]
    for broken in ({"rows": [{}]}, {"groups": {}}, {"groups": {"data": {"questions": "7"}}}):
        path.write_text(json.dumps(report.to_json() | broken))
        with pytest.raises(EvaluateError, match="is not what `kmerge-mlx evaluate --json` prints"):
            read_report(path)


def test_the_kv_cache_is_that_of_the_mean_prompt(folders, batched):
    position = 2 * 2 * 2 * 32 * 4  # keys and values of 2 layers of 2 heads, 32 wide, float32
    for row in batched[1].rows:
        lines = batched[0][row.method, row.k]
        mean = sum(line["positions"] for line in lines) / QUESTIONS
        assert row.kv_bytes == {"data": pytest.approx(mean * position)}
        assert row.time_to_first_token == {}


def test_baselines_that_need_no_encoder_are_measured_without_an_adapter(folders, data):
    asked = {"model": str(folders.base), "data": str(data), "limit": 6, "max_tokens": 1}
    report = measured(**asked, k=(2, 4), baseline=("all",))
    assert [(row.method, row.k) for row in report.rows] == [
        ("uncompressed", 1),
        *((n, k) for k in (2, 4) for n in ("truncate", "stride", *WEIGHING)),
    ]
    for k, baseline, said in (
        ((2,), (), "`k` is 2, and there is no merge encoder: give `adapter_path`, or compare"),
        ((2,), ("base",), "only `baseline` truncate, stride, selective-context, spec-prefill"),
        ((2,), ("all", "mean"), "`baseline` mean needs one, and there is no merge encoder"),
    ):
        with pytest.raises(EvaluateError, match=said):
            measured(**asked, k=k, baseline=baseline)


def test_the_base_is_read_beside_an_adapter_for_1(folders, data, batched):
    asked = {"model": str(folders.base), "data": str(data), "max_tokens": MAX_TOKENS}
    alone = measured(**asked, batch_size=8)
    rows = {row.method: row for row in batched[1].rows}
    assert rows["base"].scores == alone.rows[0].scores != rows["uncompressed"].scores


def test_a_report_of_0_1_0_has_no_costs(tmp_path, batched):
    path, report = tmp_path / "report.json", batched[1].to_json()
    for row in report["rows"]:
        del row["kv_bytes"], row["time_to_first_token"]
    path.write_text(json.dumps(report))
    assert [row.kv_bytes for row in read_report(path).rows] == [{}] * len(report["rows"])
