"""Self-distillation: divergences by SciPy, the teacher against mlx-lm's plain base, its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler
from scipy.special import log_softmax, rel_entr, softmax

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.train import rows as train_rows
from kmerge_mlx.train import teacher as teachers
from kmerge_mlx.train.loss import divergence
from kmerge_mlx.train.prepare import Run, prepare
from kmerge_mlx.train.rows import Place, Rows, make_batch
from kmerge_mlx.train.settings import TrainSettings
from kmerge_mlx.train.step import Engine
from tests.cli_runner import assert_one_error, copy_base
from tests.train_runs import BASE, log_of, rows_of, same, tensors_of, train, trained, write_data

V = 700
TAUGHT = ("--teacher", "base", "--batch-size", 8, "--learning-rate", 1e-3)
RUN = (*TAUGHT, "--iters", 4, "--steps-per-report", 1, "--steps-per-eval", 2)


def plain_base():
    """mlx-lm's own base, told the RoPE: its Qwen2 does not look where transformers 5 puts it."""
    return mlx_lm.load(str(BASE), model_config={"rope_theta": 10_000.0})


def prepared(tmp_path: Path, rows, **settings: object) -> Run:
    given = {"model": str(BASE), "data": str(write_data(tmp_path / "data", rows)), "batch_size": 4}
    config = TrainSettings.of(given | {"adapter_path": str(tmp_path / "run")} | settings)
    return prepare(config)


def distributions(count: int, spread: float, seed: int = 0) -> mx.array:
    mx.random.seed(seed)
    return mx.random.normal((count, V)) * spread


def exact_kl(teacher: mx.array, student: mx.array, top_k: int = 0) -> np.ndarray:
    """KL(teacher || student) by SciPy; of the teacher's top tokens and one outcome for the rest."""
    p, q = (softmax(np.array(logits, np.float64), axis=-1) for logits in (teacher, student))
    if top_k:
        top = np.argsort(-p, axis=-1)[:, :top_k]
        p, q = (np.take_along_axis(part, top, axis=-1) for part in (p, q))
        p, q = (np.append(part, 1 - part.sum(-1, keepdims=True), axis=-1) for part in (p, q))
    return rel_entr(p, q).sum(-1)


def taught(teacher: mx.array, top_k: int = 0):
    """A batch that carries a teacher's words."""
    batch = make_batch([TokenizedExample([Segment([1, 2])], [3, 0])], 2, 0, V)
    logprobs, ids = nn.log_softmax(teacher), mx.zeros((0,), mx.int32)
    if top_k:
        ids = mx.argsort(-logprobs, axis=-1)[:, :top_k]
        logprobs = mx.take_along_axis(logprobs, ids, axis=-1)
    return replace(batch, teacher_ids=ids, teacher_logprobs=logprobs)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_divergences_are_scipys_and_of_top_tokens_never_above_the_whole(spread):
    teacher, student = distributions(9, spread), distributions(9, spread, seed=1)
    whole = exact_kl(teacher, student)
    assert np.array(divergence(student, taught(teacher))) == pytest.approx(whole, rel=1e-4)
    for top_k in (1, 5, 100):
        found = np.array(divergence(student, taught(teacher, top_k)))
        # float32 sums of probabilities that leave little over
        assert found == pytest.approx(exact_kl(teacher, student, top_k), rel=1e-3, abs=1e-4)
        assert (found <= whole + 1e-4).all()
        assert (found >= 0).all()
    for top_k in (0, 1, 20, V):  # a student that says the same
        for same_as in (teacher, teacher + 5.0):
            assert mx.abs(divergence(same_as, taught(teacher, top_k))).max().item() < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [0, 7])
def test_the_teacher_is_mlx_lms_plain_base_on_the_whole_row(tmp_path, top_k):
    rows = [
        *rows_of(5),
        {"context": "Tree: AB and C", "prompt": "Child: ", "completion": "AB CD EF"},
    ]
    run = prepared(tmp_path, rows, teacher="base", teacher_top_k=top_k)
    examples = list(run.stages[0].train)
    ids, logprobs = run.teacher.targets(examples)
    plain, _ = plain_base()
    at = 0
    for example in examples:
        row = [*example.prompt_ids, *example.answer_ids[:-1]]
        logits = plain(mx.array([row]))[0, len(example.prompt_ids) - 1 :]
        for position in log_softmax(np.array(logits.astype(mx.float32)), axis=-1):
            found = np.array(logprobs[at])
            if top_k:
                assert len(set(ids[at].tolist())) == top_k
                assert sorted(found) == pytest.approx(sorted(position)[-top_k:], abs=1e-4)
                position = position[np.array(ids[at])]
            assert found == pytest.approx(position, abs=1e-4)
            at += 1
    assert at == sum(len(example.answer_ids) for example in examples)
    assert logprobs.shape[1] == (top_k or V)


@pytest.mark.slow
def test_the_teacher_stays_what_it_was_while_whole_layers_are_trained(tmp_path):
    run = prepared(tmp_path, rows_of(8), teacher="base", fine_tune_type="full", learning_rate=1e-2)
    examples = [run.stages[0].train[i] for i in range(4)]
    before = np.array(run.teacher.targets(examples)[1])
    engine = Engine(run)
    for _ in range(3):
        run.state.iteration += 1
        engine.step(Rows([0, 1, 2, 3], examples, Place()))
    assert (np.array(run.teacher.targets(examples)[1]) == before).all()
    assert engine.read_window()[0] > 0


@pytest.mark.slow
def test_the_logged_divergence_is_that_of_merged_and_plain_logits(tmp_path):
    """Before training: the merged embedding is the mean, so mlx-lm's model can be asked."""
    rows = rows_of(4)
    data, path = write_data(tmp_path / "data", rows, rows), tmp_path / "run"
    trained(path, "--data", data, *TAUGHT, "--iters", 1, "--batch-size", 4)
    run = prepared(tmp_path / "again", rows)
    plain, _ = plain_base()
    table, pad, total, tokens = plain.model.embed_tokens, run.merge.pad_token_id, 0.0, 0
    for example in run.stages[0].train:
        prompt, answer = example.prompt_ids, example.answer_ids[:-1]
        filled = [*prompt, *[pad] * (-len(prompt) % 4)]
        merged = table(mx.array(filled)).reshape(-1, 4, 64).mean(axis=1)
        row = mx.concatenate([merged, table(mx.array(answer, mx.int32))])[None]
        student = plain(mx.zeros(row.shape[:2], mx.int32), input_embeddings=row)
        teacher = plain(mx.array([[*prompt, *answer]]))
        at = (teacher[0, len(prompt) - 1 :], student[0, len(filled) // 4 - 1 :])
        total, tokens = total + exact_kl(*at).sum(), tokens + len(example.answer_ids)
    assert log_of(path, "val_kl")[0][1] == pytest.approx(total / tokens, rel=1e-4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A folder with data, a teacher's file, and the run that made it."""
    folder = tmp_path_factory.mktemp("stored")
    write_data(folder / "data", rows_of(20), rows_of(9, 20))
    file = ("--teacher-top-k", 5, "--teacher-file", folder / "teacher.safetensors")
    trained(folder / "run", "--data", folder / "data", *RUN, *file)
    return folder


@pytest.mark.slow
def test_a_stored_teacher_teaches_what_the_live_one_does(tmp_path, stored):
    live = tmp_path / "live"
    trained(live, "--data", stored / "data", *RUN, "--teacher-top-k", 5)
    for name in ("train_loss", "val_kl", "val_loss"):
        wanted = [value for _, value in log_of(live, name)]
        assert [v for _, v in log_of(stored / "run", name)] == pytest.approx(wanted, rel=1e-4)
    assert same(tensors_of(live), tensors_of(stored / "run"), atol=1e-5)


@pytest.mark.slow
def test_a_file_of_something_else_or_none_of_a_teacher_is_refused(tmp_path, stored):
    other = write_data(tmp_path / "other", rows_of(20, 5), rows_of(9, 20))
    (tmp_path / "file").write_bytes(b"no tensors")
    file = ("--teacher-top-k", 5, "--teacher-file", stored / "teacher.safetensors")
    changed = "teacher.safetensors was made of another base, data or --teacher"
    for said, *change in (
        (changed, "--teacher-top-k", 6),
        (changed, "--data", other),
        ("not a safetensors file (", "--teacher-file", tmp_path / "file"),
        ("--teacher-top-k is 701, the model has 700 tokens", "--teacher-top-k", V + 1),
    ):
        result = train(tmp_path / "run", "--data", stored / "data", *RUN, *file, *change)
        assert_one_error(result, 1, said)
    assert (tmp_path / "file").read_bytes() == b"no tensors"
    assert not (tmp_path / "run").exists()


def greedy_by_mlx_lm(prompt: str, tokens: int) -> list[int]:
    """What mlx-lm's base answers, its end-of-text token included."""
    model, tokenizer = plain_base()
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    responses = mlx_lm.stream_generate(
        model, tokenizer, ids, max_tokens=tokens, sampler=make_sampler(0.0)
    )
    return [response.token for response in responses]


@pytest.mark.slow
def test_missing_answers_are_the_bases_own_greedy_ones(tmp_path):
    rows = rows_of(6)
    bare = [{"prompt": row["prompt"]} for row in rows]
    mixed = [rows[0], *bare[1:]]
    data, path = write_data(tmp_path / "data", mixed, bare), tmp_path / "run"
    options = ("--teacher-answers", "--teacher-max-tokens", 5, "--batch-size", 4, "--iters", 1)
    trained(path, "--data", data, "--teacher", "base", *options)
    wanted = {str(i): greedy_by_mlx_lm(row["prompt"], 5) for i, row in enumerate(bare)}
    answers = json.loads((path / "training" / "answers.json").read_text())
    assert answers["valid"] == wanted
    assert answers["train"] == {i: ids for i, ids in wanted.items() if i != "0"}


def test_long_prompts_are_answered_few_at_once(tmp_path, monkeypatch):
    run = prepared(tmp_path, rows_of(6), teacher="base")
    examples = [TokenizedExample([Segment([9] * n, False)], []) for n in (30, 30, 70, 20, 20, 20)]
    asked, answers = [], teachers.batch_generate

    def answer(model, tokenizer, prompts, **options):
        asked.append([sum(len(s.ids) for s in prompt) for prompt in prompts])
        return answers(model, tokenizer, prompts, **options)

    monkeypatch.setattr(teachers, "batch_generate", answer)
    monkeypatch.setattr(train_rows, "MOST_READ", 60)
    sets = {"train": examples}
    found = teachers.write_answers(run.teacher, run.tokenizer, sets, 2, lambda *_: None)
    assert asked == [[30, 30], [70], [20, 20, 20]]
    assert list(found["train"]) == [*"012345"]


@pytest.mark.slow
def test_an_answer_that_ends_by_itself_is_ended_by_the_eos_token(tmp_path):
    """Of two tokens that end a text, the one that the student is to learn."""
    bare = [{"prompt": row["prompt"]} for row in rows_of(4)]
    (first,) = greedy_by_mlx_lm(bare[0]["prompt"], 1)
    base = copy_base(BASE, tmp_path / "base", eos_token_id=[0, first])
    (base / "generation_config.json").unlink()
    data, path = write_data(tmp_path / "data", bare), tmp_path / "run"
    options = ("--teacher-answers", "--teacher-max-tokens", 5, "--batch-size", 4, "--iters", 1)
    trained(path, "--data", data, "--teacher", "base", *options, model=base)
    assert json.loads((path / "training" / "answers.json").read_text())["train"]["0"] == [0]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_answers_and_torn_ones_are_one_line(tmp_path, monkeypatch):
    bare = [{"prompt": row["prompt"]} for row in rows_of(8)]
    data = write_data(tmp_path / "data", bare)
    options = ("--teacher-answers", "--teacher-max-tokens", 3, "--data", data, *TAUGHT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(whole, *options, "--iters", 4)
    trained(parts, *options, "--iters", 2)
    saved = (parts / "training" / "answers.json").read_bytes()
    monkeypatch.setattr("kmerge_mlx.train.teacher.write_answers", None)
    trained(parts, *options, "--iters", 4, "--resume")
    assert (parts / "training" / "answers.json").read_bytes() == saved
    assert same(tensors_of(parts), tensors_of(whole), atol=1e-6)
    (parts / "training" / "answers.json").write_text("{")
    result = train(parts, *options, "--iters", 6, "--resume")
    assert_one_error(result, 1, "answers.json cannot be read (")
