"""The scripts that train the bundled base model: its tokenizer, its rows, its start, its folder."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_tokenizer

import kmerge_mlx
from kmerge_mlx.base import default_pad_token_id
from kmerge_mlx.data.fingerprint import fingerprint
from kmerge_mlx.data.textualized_tree import FIND_PARENT, TreeTask, draw
from kmerge_mlx.files import write_json

SCRIPTS = Path(__file__).parents[1] / "examples" / "bundled"
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
TREE = "Tree: AB\n+CD\n++EF\n+GH"
ASKED = ", Task: Parent/Child Relationship, Parent: AB, Child: GH, Answer: "
PROMPT = TREE + ASKED
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def scripts():
    """The modules ``tokenizer``, ``tree_rows`` and ``train_base``."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import tokenizer
        import train_base
        import tree_rows

        yield {"tokenizer": tokenizer, "rows": tree_rows, "train": train_base}
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("tokenizer", "tree_rows", "train_base"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def make(scripts):
    return scripts["rows"].RowMaker(scripts["tokenizer"].build())


@pytest.fixture(scope="module")
def loaded_tokenizer(scripts, tmp_path_factory):
    """The tokenizer as mlx-lm loads it, beside the config that decides its class."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_json(folder / "config.json", scripts["train"].model_config(277, 276))
    scripts["tokenizer"].save(folder)
    return load_tokenizer(folder)


@pytest.fixture
def trainer_of(scripts, monkeypatch):
    """Makes trainers of a one-layer model on two trees a step, without compiling."""
    train = scripts["train"]
    monkeypatch.setattr(scripts["rows"], "HELD_OUT", 4)
    mx.disable_compile()
    recipe = train.Recipe(steps=6, trees=2, eval_every=3, eval_trees=4)
    yield lambda folder: train.Trainer(recipe, folder, TINY)
    mx.enable_compile()


@pytest.mark.parametrize(
    "text",
    [
        PROMPT,
        " leading",
        "trailing ",
        "  ",
        "\n\n+++\n",
        "true, falsehood",
        "a\x00b",
        "né 木 🌳\r\n",
    ],
)
def test_any_text_round_trips_whole_and_streamed(scripts, loaded_tokenizer, text):
    ids = loaded_tokenizer.encode(text, add_special_tokens=False)
    streamed = loaded_tokenizer.detokenizer
    for token in ids:
        streamed.add_token(token)
    streamed.finalize()
    assert loaded_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert scripts["tokenizer"].build().encode(text).ids == ids
    assert streamed.text == text


def test_a_node_takes_four_tokens_and_every_phrase_one(loaded_tokenizer):
    tokens = [loaded_tokenizer.decode([i]) for i in loaded_tokenizer.encode(PROMPT)]
    assert tokens == [
        *("Tree: ", "A", "B", "\n", "+", "C", "D", "\n", "++", "E", "F", "\n", "+", "G", "H"),
        *(", Task: Parent/Child Relationship", ", Parent: ", "A", "B", ", Child: ", "G", "H"),
        ", Answer: ",
    ]


def test_a_space_is_one_token_and_the_end_of_text_is_special(loaded_tokenizer):
    assert default_pad_token_id(loaded_tokenizer) == loaded_tokenizer.encode(" ")[0]
    assert len(loaded_tokenizer.encode(" ", add_special_tokens=False)) == 1
    end = loaded_tokenizer.eos_token_id
    assert loaded_tokenizer.decode([end], skip_special_tokens=True) == ""
    assert loaded_tokenizer.eos_token_ids == {end}


def test_a_row_weighs_tree_question_and_answer(make, loaded_tokenizer):
    rows = make([f"{PROMPT}true{END}{ASKED}true{END}", f"{PROMPT}true{END}"])
    pieces = dict.fromkeys((0.1, 0.3, 1.0), "")
    for token, weight in zip(rows.ids[0], rows.weights[0], strict=True):
        if weight:
            pieces[round(float(weight), 1)] += loaded_tokenizer.decode([token])
    assert pieces[0.1] == TREE
    assert pieces[1.0] == f"true{END}true{END}"
    assert loaded_tokenizer.decode(rows.ids[1][rows.weights[1] > 0]) == f"{PROMPT}true{END}"
    assert rows.ids.shape[1] % 16 == 0


def test_a_training_row_asks_both_kinds_and_as_many_true_as_false(scripts, make, loaded_tokenizer):
    rows = scripts["rows"].training_rows(make, 10, 0, 16, 42, set())
    texts = [loaded_tokenizer.decode(ids) for ids in rows.ids]
    assert sum(t.count("Answer: true") for t in texts) == sum(
        t.count("Answer: false") for t in texts
    )
    assert max(t.count("Find Parent") for t in texts) == 4
    again = scripts["rows"].training_rows(make, 10, 0, 16, 42, set())
    assert np.array_equal(rows.ids, again.ids)


def test_no_training_tree_is_held_out(scripts, make, loaded_tokenizer, monkeypatch):
    tree_rows = scripts["rows"]
    plain = tree_rows.training_rows(make, 6, 0, 8, 42, set())
    trees = [loaded_tokenizer.decode(ids).split(", Task")[0][6:] for ids in plain.ids]
    held_out = {fingerprint(trees[0]), fingerprint(trees[3])}
    rows = tree_rows.training_rows(make, 6, 0, 8, 42, held_out)
    left = [loaded_tokenizer.decode(ids).split(", Task")[0][6:] for ids in rows.ids]
    assert {i for i in range(8) if trees[i] != left[i]} == {0, 3}

    monkeypatch.setattr(tree_rows, "HELD_OUT", 2)
    asked = draw(TreeTask(tree_rows.shapes(7)[1]), "valid", 1)[0]
    assert fingerprint(asked.text) in tree_rows.held_out_trees()


def test_validation_asks_one_question_a_row_in_the_papers_format(scripts, make, loaded_tokenizer):
    questions = scripts["rows"].validation_questions(scripts["rows"].shapes(10), 6, 42)
    rows = scripts["rows"].validation_rows(make, questions)
    for question, ids in zip(questions, rows.ids, strict=True):
        text = loaded_tokenizer.decode(ids, skip_special_tokens=True)
        assert text == question.prompt + question.answer
    assert {q.kind == FIND_PARENT for q in questions} == {True, False}


def test_scores_count_whole_answers_and_balance_true_and_false(scripts, make):
    questions = scripts["rows"].validation_questions(scripts["rows"].shapes(10), 6, 42)
    rows = scripts["rows"].validation_rows(make, questions)
    scores = scripts["rows"].scores
    assert scores(questions, rows, rows.ids) == {"balanced_accuracy": 1, "find_parent": 1}
    always_false = np.where(rows.answer, make(["false"]).ids[0, 0], rows.ids)
    ended = np.where(rows.ids == rows.ids[0, -1], rows.ids, always_false)
    assert scores(questions, rows, ended) == {"balanced_accuracy": 0.5, "find_parent": 0}


def test_every_other_head_starts_attending_to_equal_tokens(scripts):
    train = scripts["train"]
    model = train.build_model(train.model_config(284, 283), seed=3)
    attention = model.layers[2].self_attn
    x = mx.fast.rms_norm(mx.random.normal((1, 50, 128)), mx.ones(128), 1e-6)
    q, k = (p(x).reshape(50, 4, 32).swapaxes(0, 1) for p in (attention.q_proj, attention.k_proj))
    equal = (q @ k.swapaxes(1, 2)).argmax(-1) == mx.arange(50)
    assert equal[0].all()
    assert equal[2].all()
    assert equal[1].mean() < 0.2
    assert mx.allclose(attention.o_proj.weight, attention.v_proj.weight.T)


def test_the_rate_warms_up_and_ends_near_two_percent(scripts):
    train = scripts["train"]
    rates = [train.learning_rate(train.Recipe(steps=1000), step) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-5, rel=0.01)
    assert max(rates) == rates[99]
    assert rates[-1] == pytest.approx(0.02 * 2e-3, rel=0.01)


def test_resuming_gives_the_same_weights_bit_for_bit(scripts, trainer_of, tmp_path):
    run = scripts["train"].run
    whole, records = trainer_of(tmp_path / "whole"), []
    run(whole, 3, records.append)

    half = trainer_of(tmp_path / "half")
    for _ in half.train():
        half.save()
        break
    resumed = trainer_of(tmp_path / "half")
    resumed.resume()
    run(resumed, 3, lambda record: None)
    assert resumed.step == whole.step == 6
    assert [r["step"] for r in records] == [3, 6]
    expected = dict(tree_flatten(whole.model.parameters()))
    for name, value in tree_flatten(resumed.model.parameters()):
        assert mx.array_equal(value, expected[name]), name


def test_the_folder_loads_in_mlx_lm_and_here_with_the_same_logits(trainer_of, tmp_path):
    trainer = trainer_of(tmp_path / "base")
    trainer.save()
    ids = mx.array([trainer.tokenizer.encode(PROMPT).ids])
    expected = trainer.model(ids)
    for load in (mlx_lm.load, kmerge_mlx.load):
        model, tokenizer = load(str(tmp_path / "base"))
        assert tokenizer.encode(PROMPT) == ids[0].tolist()
        assert mx.array_equal(model(ids), expected)
        assert model.args.rope_theta == 1e5


def test_a_question_sees_the_tree_and_no_other_question(scripts, make, trainer_of, tmp_path):
    model = trainer_of(tmp_path / "base").model

    def loss(first: str) -> float:
        rows = make([f"{TREE}{first}{END}{ASKED}true{END}"])
        last = rows.answer * (rows.asked == 2)
        return scripts["train"].row_loss(model, *map(mx.array, (rows.ids, last, rows.asked))).item()

    other = ASKED.replace("AB", "EF")
    assert loss(f"{other}true") == loss(f"{other}false") == loss(f"{ASKED}true")
    rows = make([f"{PROMPT}true{END}"])
    plain = nn.losses.cross_entropy(model(mx.array(rows.ids))[:, :-1], mx.array(rows.ids[:, 1:]))
    arrays = map(mx.array, (rows.ids, rows.weights, rows.asked))
    expected = np.average(np.array(plain), weights=rows.weights[:, 1:])
    assert scripts["train"].row_loss(model, *arrays).item() == pytest.approx(expected, rel=1e-5)
