"""How the bundled base model is trained: its phases, its losses, its folder."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

import kmerge_mlx
from tests.bundled_scripts import ASKED, NAMED, PROMPT, TREE


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
