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
from kmerge_mlx.data.textualized_tree import FIND_PARENT, Question, TreeTask, draw
from kmerge_mlx.data.trees import Tree
from kmerge_mlx.files import write_json

SCRIPTS = Path(__file__).parents[1] / "examples" / "bundled"
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
TREE = "Tree: AB\n+CD\n++EF\n+GH"
TASK = ", Task: Parent/Child Relationship"
ASKED = f"{TASK}, Parent: AB, Child: GH, Answer: "
NAMED = ", Task: Find Parent, Child: GH, Answer: "
PROMPT = TREE + ASKED
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def scripts():
    """The modules ``tokenizer``, ``tree_rows``, ``base_model`` and ``train_base``."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import base_model
        import tokenizer
        import train_base
        import tree_rows

        yield {
            "tokenizer": tokenizer,
            "rows": tree_rows,
            "model": base_model,
            "train": train_base,
        }
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("tokenizer", "tree_rows", "base_model", "train_base"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def make(scripts):
    return scripts["rows"].RowMaker(scripts["tokenizer"].build())


@pytest.fixture(scope="module")
def loaded_tokenizer(scripts, tmp_path_factory):
    """The tokenizer as mlx-lm loads it, beside the config that decides its class."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_json(folder / "config.json", scripts["model"].model_config(277, 276))
    scripts["tokenizer"].save(folder)
    return load_tokenizer(folder)


@pytest.fixture
def trainer_of(scripts, monkeypatch):
    """Makes trainers of a two-layer model on two trees a step, without compiling."""
    train = scripts["train"]
    monkeypatch.setattr(scripts["rows"], "HELD_OUT", 4)
    mx.disable_compile()
    names = ("packed", "spread", "first", "all")
    phases = tuple(train.Phase(name, 3, 1e-3, 1) for name in names)
    recipe = train.Recipe(phases, trees=2, eval_every=2, eval_trees=4, last_nodes=6)
    yield lambda folder: train.Trainer(recipe, folder, TINY)
    mx.enable_compile()


@pytest.fixture
def row_of(make):
    """Makes the row of one tree and some questions with their answers."""
    tree = Tree(("AB", "CD", "EF", "GH"), (-1, 0, 1, 0))
    assert tree.text == TREE.removeprefix("Tree: ")

    def of(*asked: tuple[str, str], nodes: int = 4):
        kinds = [FIND_PARENT if "Find" in text else "edge" for text, _ in asked]
        questions = [
            Question(TREE + text, answer, kind, 1)
            for (text, answer), kind in zip(asked, kinds, strict=True)
        ]
        return make([(tree, questions)], nodes, len(asked))

    return of


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
        *(", Task: Parent/Child Relationship", ", Parent: ", "A", "B", ", Child", ": ", "G", "H"),
        ", Answer: ",
    ]
    tokens = [loaded_tokenizer.decode([i]) for i in loaded_tokenizer.encode(TREE + NAMED)]
    assert tokens[15:] == [", Task: Find Parent, Child", ": ", "G", "H", ", Answer: "]


def test_a_space_is_one_token_and_the_end_of_text_is_special(loaded_tokenizer):
    assert default_pad_token_id(loaded_tokenizer) == loaded_tokenizer.encode(" ")[0]
    assert len(loaded_tokenizer.encode(" ", add_special_tokens=False)) == 1
    end = loaded_tokenizer.eos_token_id
    assert loaded_tokenizer.decode([end], skip_special_tokens=True) == ""
    assert loaded_tokenizer.eos_token_ids == {end}


def test_a_row_weighs_text_and_answers_and_pads_the_tree_on_the_left(row_of, loaded_tokenizer):
    rows, decode = row_of((ASKED, "true"), (NAMED, "AB"), nodes=6), loaded_tokenizer.decode
    told, asked = rows.tree_weights[0], rows.asked_weights[0]
    assert rows.tree.shape == (1, 23)
    assert decode(rows.tree[0][told > 0]) == TREE
    assert (told[:8] == 0).all()
    assert set(rows.tree[0][:8]) == {loaded_tokenizer.eos_token_id}
    for row, question, answer in zip((0, 1), (ASKED, NAMED), ("true", "AB"), strict=True):
        assert decode(rows.asked[0, row][asked[row] == np.float32(0.1)]) == question
        assert decode(rows.asked[0, row][asked[row] == 1]) == answer + END
        assert decode(rows.asked[0, row][rows.answers[0, row]]) == answer + END


def test_places_are_the_ends_of_blocks_and_what_the_answers_follow(row_of, loaded_tokenizer):
    rows = row_of((ASKED, "true"), (NAMED, "AB"))
    read = np.take_along_axis(rows.asked, rows.places, -1)[0]
    pieces = [[loaded_tokenizer.decode([i]) for i in ids] for ids in read]
    assert pieces[0] == [TASK, ", Child", ", Answer: ", "true"]
    assert pieces[1] == [", Task: Find Parent, Child", ", Answer: ", "A", "B"]


def test_a_training_row_asks_both_kinds_and_about_as_many_true_as_false(scripts, make):
    rows = scripts["rows"].training_rows(make, 10, 0, 16, 42, set())
    # A tree with fewer questions than places is asked some again.
    assert (rows.kinds == "true").sum() == pytest.approx((rows.kinds == "false").sum(), abs=2)
    assert (rows.kinds == FIND_PARENT).sum(axis=1).max() == 4
    again = scripts["rows"].training_rows(make, 10, 0, 16, 42, set())
    assert np.array_equal(rows.asked, again.asked)
    assert np.array_equal(rows.tree, again.tree)


def test_no_training_tree_is_held_out(scripts, make, loaded_tokenizer, monkeypatch):
    tree_rows = scripts["rows"]

    def trees(held_out: set[int]) -> list[str]:
        rows = tree_rows.training_rows(make, 6, 0, 8, 42, held_out)
        real = zip(rows.tree, rows.tree_weights > 0, strict=True)
        return [loaded_tokenizer.decode(ids[kept])[6:] for ids, kept in real]

    plain = trees(set())
    left = trees({fingerprint(plain[0]), fingerprint(plain[3])})
    assert {i for i in range(8) if plain[i] != left[i]} == {0, 3}

    monkeypatch.setattr(tree_rows, "HELD_OUT", 2)
    asked = draw(TreeTask(tree_rows.shapes(7)[1]), "valid", 1)[0]
    assert fingerprint(asked.text) in tree_rows.held_out_trees()


def test_validation_asks_held_out_trees_in_the_papers_format(scripts, make, loaded_tokenizer):
    shapes = scripts["rows"].shapes(10)
    rows = scripts["rows"].validation_rows(make, shapes, 6, 42)
    tasks = [TreeTask(shape, seed=42, questions_per_tree=2, find_parent=1) for shape in shapes]
    for index in range(6):
        _, questions = draw(tasks[index % 2], "valid", index // 2)
        told = rows.tree[index][rows.tree_weights[index] > 0]
        for column, question in enumerate(questions):
            asked = rows.asked[index, column][rows.asked_weights[index, column] > 0]
            text = loaded_tokenizer.decode([*told, *asked], skip_special_tokens=True)
            assert text == question.prompt + question.answer
    assert set(rows.kinds.flat) == {"true", "false", FIND_PARENT}


def test_scores_count_whole_answers_and_balance_true_and_false(scripts, make, loaded_tokenizer):
    rows = scripts["rows"].validation_rows(make, scripts["rows"].shapes(10), 6, 42)
    scores = scripts["rows"].scores
    right = np.take_along_axis(rows.asked, rows.places + 1, -1)
    assert scores(rows, right) == {"balanced_accuracy": 1, "find_parent": 1}
    false = loaded_tokenizer.encode("false")[0]
    always_false = np.where(right == loaded_tokenizer.eos_token_id, right, false)
    assert scores(rows, always_false) == {"balanced_accuracy": 0.5, "find_parent": 0}


def test_every_other_head_starts_attending_to_equal_tokens(scripts):
    build, config = scripts["model"].build_model, scripts["model"].model_config
    model = build(config(284, 283), seed=3)
    attention = model.layers[2].self_attn
    x = mx.fast.rms_norm(mx.random.normal((1, 50, 128)), mx.ones(128), 1e-6)
    q, k = (p(x).reshape(50, 4, 32).swapaxes(0, 1) for p in (attention.q_proj, attention.k_proj))
    equal = (q @ k.swapaxes(1, 2)).argmax(-1) == mx.arange(50)
    assert equal[0].all()
    assert equal[2].all()
    assert equal[1].mean() < 0.2
    assert mx.allclose(attention.o_proj.weight, attention.v_proj.weight.T)


def test_three_heads_of_the_first_layer_start_looking_back(scripts):
    base_model = scripts["model"]
    model = base_model.build_model(base_model.model_config(284, 283), seed=3)
    attention = model.layers[0].self_attn
    x = mx.fast.rms_norm(mx.random.normal((1, 60, 128)), mx.ones(128), 1e-6)
    q, k = (p(x).reshape(60, 4, 32).swapaxes(0, 1) for p in (attention.q_proj, attention.k_proj))
    scores = attention.rope(q[None])[0] @ attention.rope(k[None])[0].swapaxes(1, 2)
    scores = mx.where(mx.tri(60, dtype=mx.bool_), scores, -mx.inf)
    back = np.arange(60) - np.array(scores.argmax(-1))
    for head, distance in base_model.LOOKS_BACK.items():
        assert (back[head, 3:] == distance).mean() > 0.9


def test_aimed_heads_look_back_from_what_ends_a_block_and_at_themselves_from_the_rest(
    scripts, make, loaded_tokenizer
):
    base_model = scripts["model"]
    base = base_model.Base(base_model.model_config(284, 283), seed=3)
    base.aim(make.ends, make.tokens)
    ids = loaded_tokenizer.encode(PROMPT)
    attention = base.model.layers[0].self_attn
    x = base.model.layers[0].input_layernorm(base.model.model.embed_tokens(mx.array([ids])))
    q, k = (
        attention.rope(projected(x).reshape(1, len(ids), 4, 32).swapaxes(1, 2))[0]
        for projected in (attention.q_proj, attention.k_proj)
    )
    scores = mx.where(mx.tri(len(ids), dtype=mx.bool_), q @ k.swapaxes(1, 2), -mx.inf)
    back = np.arange(len(ids)) - np.array(scores.argmax(-1))
    ends = np.isin(ids, make.ends)
    for head, distance in base_model.LOOKS_BACK.items():
        assert set(back[head][ends]) == {distance}
        assert set(back[head][~ends]) == {0}


def test_the_rate_warms_up_and_ends_near_two_percent(scripts):
    phase = scripts["train"].Phase("all", 1000, 2e-3, 100)
    rates = [phase.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-5, rel=0.01)
    assert max(rates) == rates[99]
    assert rates[-1] == pytest.approx(0.02 * 2e-3, rel=0.01)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("packed", {"model.model.embed_tokens", "model.model.layers.1", "model.model.norm"}),
        (
            "spread",
            {"model.model.embed_tokens", "model.model.layers.1", "model.model.norm", "nothing"},
        ),
        ("first", {"model.model.layers.0"}),
        (
            "all",
            {f"model.model.{part}" for part in ("embed_tokens", "layers.0", "layers.1", "norm")},
        ),
    ],
)
def test_a_phase_trains_its_part_and_leaves_the_rest(scripts, trainer_of, tmp_path, name, trained):
    trainer = trainer_of(tmp_path / "base")
    while trainer.phase.name != name:
        trainer.step += 3
    trainer._begin()
    before = dict(tree_flatten(trainer.base.parameters()))
    next(trainer.train())
    moved = {
        path
        for path, value in tree_flatten(trainer.base.parameters())
        if not mx.array_equal(value, before[path])
    }
    depth = {"model.model.layers": 4}
    parts = {".".join(p.split(".")[: depth.get(p[:18], 3)]) for p in moved}
    assert parts == trained


@pytest.mark.parametrize("at", [2, 3, 6, 8])
def test_resuming_gives_the_same_weights_bit_for_bit(scripts, trainer_of, tmp_path, at):
    run = scripts["train"].run
    whole, records = trainer_of(tmp_path / "whole"), []
    run(whole, 3, records.append)

    half = trainer_of(tmp_path / "half")
    for record in half.train():
        if record["step"] == at:
            half.save()
            break
    resumed = trainer_of(tmp_path / "half")
    resumed.resume()
    run(resumed, 3, lambda record: None)
    assert resumed.step == whole.step == 12
    assert [r["step"] for r in records] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert [r["phase"] for r in records][::2] == ["packed", "spread", "first", "all"]
    expected = dict(tree_flatten(whole.base.parameters()))
    for name, value in tree_flatten(resumed.base.parameters()):
        assert mx.array_equal(value, expected[name]), name


def test_the_folder_loads_in_mlx_lm_and_here_with_the_same_logits(trainer_of, tmp_path):
    trainer = trainer_of(tmp_path / "base")
    trainer.save()
    ids = mx.array([trainer.tokenizer.encode(PROMPT).ids])
    expected = trainer.base.model(ids)
    for load in (mlx_lm.load, kmerge_mlx.load):
        model, tokenizer = load(str(tmp_path / "base"))
        assert tokenizer.encode(PROMPT) == ids[0].tolist()
        assert mx.array_equal(model(ids), expected)
        assert model.args.rope_theta == 1e5


@pytest.mark.parametrize("nodes", [4, 7])
def test_a_question_is_read_as_if_it_stood_alone(scripts, row_of, trainer_of, tmp_path, nodes):
    train, trainer = scripts["train"], trainer_of(tmp_path / "base")
    rows = row_of((NAMED, "AB"), (ASKED, "true"), (NAMED, "CD"), nodes=nodes)
    logits = train.answer_logits(trainer.base, train.arrays(rows), "all")
    for column, text in enumerate((f"{NAMED}AB", f"{ASKED}true", f"{NAMED}CD")):
        ids = trainer.tokenizer.encode(TREE).ids
        start = len(ids)
        ids += trainer.tokenizer.encode(text).ids
        alone = trainer.base.model(mx.array([ids]))[0]
        places = mx.array(rows.places[0, column]) + start
        assert mx.allclose(logits[0, column], alone[places], atol=1e-4)


def test_the_text_loss_is_the_weighted_mean_over_the_text(scripts, row_of, trainer_of, tmp_path):
    train, trainer = scripts["train"], trainer_of(tmp_path / "base")
    rows = row_of((ASKED, "true"), nodes=6)
    loss = train.text_loss(trainer.base, train.arrays(rows)).item()
    ids = mx.array([trainer.tokenizer.encode(f"{PROMPT}true{END}").ids])
    plain = np.array(nn.losses.cross_entropy(trainer.base.model(ids)[:, :-1], ids[:, 1:]))[0]
    weights = np.where(np.arange(len(plain)) < len(plain) - 2, 0.1, 1.0)
    counted = np.arange(len(plain)) != 14  # the first token of the question is not asked for
    expected = np.average(plain[counted], weights=weights[counted])
    assert loss == pytest.approx(expected, rel=1e-5)


def test_codes_are_sums_at_the_ends_of_blocks_and_nothing_elsewhere(
    scripts, row_of, trainer_of, tmp_path
):
    train, base = scripts["train"], trainer_of(tmp_path / "base").base
    base.nothing = mx.full(base.nothing.shape, 7.0)
    rows = row_of((ASKED, "true"), (NAMED, "AB"), nodes=5)
    tree, asked, answers, places, _, _ = train.arrays(rows)
    codes = base.codes(tree, asked, answers, places)[0]
    embed = base.model.model.embed_tokens

    def code(ids: mx.array) -> mx.array:
        return sum(embed(i) @ turn for i, turn in zip(ids, base._maps, strict=True))

    told, (own, named) = codes[:19], codes[19:].reshape(2, 11, -1)
    last = [*tree[0, -3:], asked[0, 0, 0]]
    expected = [
        (told[7], code(tree[0, 4:8])),
        (told[15], code(tree[0, 12:16])),
        (own[0], code(last)),
        (own[4], code(asked[0, 0, 1:5])),
        (own[8], code(asked[0, 0, 5:9])),
        (own[9], embed(asked[0, 0, 9])),
        (named[4], code(asked[0, 1, 1:5])),
        (named[5], embed(asked[0, 1, 5])),
        (named[6], embed(asked[0, 1, 6])),
    ]
    for found, wanted in expected:
        assert mx.allclose(found, wanted, atol=1e-5)
    for empty in (
        *(told[i] for i in (4, 5, 6, 8, 16, 17, 18)),
        own[1],
        own[5],
        own[7],
        named[1],
        named[3],
    ):
        assert mx.array_equal(empty, base.nothing)

    packed = base.packed(codes[None], 19, places)[0]
    assert packed.shape[0] == 4 + 2 * 4
    assert mx.array_equal(packed[1], told[7])
    assert mx.array_equal(packed[4 + 2], own[8])
    assert mx.array_equal(packed[4 + 7], named[6])


def test_a_first_layer_that_writes_the_codes_has_no_loss(
    scripts, row_of, trainer_of, tmp_path, monkeypatch
):
    train, base = scripts["train"], trainer_of(tmp_path / "base").base
    batch = train.arrays(row_of((ASKED, "true"), (NAMED, "AB"), nodes=5))
    assert train.code_loss(base, batch).item() > 0.01
    written = base.codes(*batch[:4])
    monkeypatch.setattr(type(base), "through", lambda *_: written)
    assert train.code_loss(base, batch).item() == 0
    off = mx.zeros(written.shape).at[:, 7].add(1.0)  # a line end's
    monkeypatch.setattr(type(base), "through", lambda *_: written + off)
    assert train.code_loss(base, batch).item() > 0.01
