"""The scripts that train the bundled base model, as fixtures, and questions in their format."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from kmerge_mlx.data.textualized_tree import FIND_PARENT, Question, Tree
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
