"""How the bundled base model is made: its tokenizer, its rows, its training, its folder."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_tokenizer

import kmerge_mlx
from kmerge_mlx.base import default_pad_token_id
from kmerge_mlx.data.tasks import fingerprint
from kmerge_mlx.data.textualized_tree import FIND_PARENT, Question, Tree, TreeTask
from kmerge_mlx.files import write_json

SCRIPTS = Path(__file__).parents[2] / "examples" / "bundled"
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
TREE = "Tree: AB\n+CD\n++EF\n+GH"
TASK = ", Task: Parent/Child Relationship"
ASKED = f"{TASK}, Parent: AB, Child: GH, Answer: "
NAMED = ", Task: Find Parent, Child: GH, Answer: "
PROMPT = TREE + ASKED


@pytest.fixture(scope="module")
def scripts():
    """The modules ``tokenizer``, ``tree_rows``, ``base_model`` and ``train_base``."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import base_model
        import tokenizer
        import train_base
        import tree_rows

        yield {"tokenizer": tokenizer, "rows": tree_rows, "model": base_model, "train": train_base}
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


@pytest.mark.parametrize("text", [PROMPT, " leading", "trailing ", "\n\n+++\n", "a\x00b 木 🌳\r\n"])
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
    assert loaded_tokenizer.encode(" ") == [default_pad_token_id(loaded_tokenizer)]
    assert loaded_tokenizer.eos_token_ids == {loaded_tokenizer.eos_token_id}


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
    asked = TreeTask(tree_rows.shapes(7)[1]).draw("valid", 1)[0]
    assert fingerprint(asked.text) in tree_rows.held_out_trees()


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 8])
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
def test_a_question_is_read_as_if_it_stood_alone(scripts, make, trainer_of, tmp_path, nodes):
    train, trainer = scripts["train"], trainer_of(tmp_path / "base")
    tree = Tree(("AB", "CD", "EF", "GH"), (-1, 0, 1, 0))
    asked = ((NAMED, "AB", FIND_PARENT), (ASKED, "true", "edge"), (NAMED, "CD", FIND_PARENT))
    questions = [Question(TREE + text, answer, kind, 1) for text, answer, kind in asked]
    rows = make([(tree, questions)], nodes, len(questions))
    logits = train.answer_logits(trainer.base, train.arrays(rows), "all")
    for column, text in enumerate((f"{NAMED}AB", f"{ASKED}true", f"{NAMED}CD")):
        ids = trainer.tokenizer.encode(TREE).ids
        start = len(ids)
        ids += trainer.tokenizer.encode(text).ids
        alone = trainer.base.model(mx.array([ids]))[0]
        places = mx.array(rows.places[0, column]) + start
        assert mx.allclose(logits[0, column], alone[places], atol=1e-4)
