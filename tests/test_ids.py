"""A token id past the embedding table is refused by name: MLX would read whatever lies there."""

from __future__ import annotations

import json
import re

import pytest

from kmerge_mlx import batch_generate, generate, load
from kmerge_mlx.data.examples import Example
from kmerge_mlx.data.layout import tokenize
from kmerge_mlx.errors import PromptError
from kmerge_mlx.model import attach
from tests.cli_runner import assert_one_error, copy_base, run
from tests.servers import serving
from tests.tiny import PROJECTIONS, random_adapter
from tests.vocabularies import base_with, byte_level

SAID = r"token id \d+ \('<extra>'\) is outside the base model's vocabulary of \d+"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose tokenizer has one token more than its table has rows."""
    tokenizer = byte_level()
    rows = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<extra>"])
    return base_with(tmp_path_factory.mktemp("base") / "base", tokenizer, rows, "<|endoftext|>")


@pytest.mark.parametrize("adapted", [False, True])
def test_generation_refuses_it(base, adapted):
    model, tokenizer = load(str(base))
    if adapted:
        attach(model, random_adapter(model, 4, PROJECTIONS), 5)
    for text in ("AB <extra>", "<extra>"):
        with pytest.raises(PromptError, match=SAID):
            generate(model, tokenizer, text)
        with pytest.raises(PromptError, match=SAID):
            batch_generate(model, tokenizer, ["AB", text])
    assert generate(model, tokenizer, "AB", max_tokens=2) is not None


def test_end_of_text_tokens_past_the_table_do_not_index_its_logits(base, tmp_path):
    copy = copy_base(base, tmp_path / "base")
    config = json.loads((copy / "config.json").read_text())
    rows = config["vocab_size"]
    config["eos_token_id"] = [config["eos_token_id"], rows, 10**6, -1]
    (copy / "config.json").write_text(json.dumps(config))
    _, tokenizer = load(str(copy))
    assert tokenizer.eos_token_ids == {config["eos_token_id"][0]}
    for token in ("<extra>", rows):
        line = ("generate", "--model", base, "-p", "AB", "--extra-eos-token", token)
        assert_one_error(run(*line), 1, "is outside the base model's vocabulary")
    with serving(str(copy), None) as server:
        sampled = {"temperature": 1, "xtc_probability": 1, "max_tokens": 3}
        assert server.complete(prompt="AB", **sampled).status == 200


def test_rows_are_refused_in_prompt_and_answer(base):
    _, tokenizer = load(str(base))
    for example in (Example(None, "<extra>", "AB"), Example(None, "AB", "it is <extra>")):
        with pytest.raises(PromptError, match=SAID):
            tokenize(tokenizer, example)
    tokenize(tokenizer, Example(None, "AB", "CD"))


def test_the_commands_refuse_it(base, tmp_path):
    row = {"prompt": "AB CD EF GH", "completion": "<extra>"}
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    model = ("--model", base)
    data = (*model, "--data", tmp_path)
    for line in (
        ("generate", *model, "-p", "AB <extra>"),
        ("train", *data, "--k", 4, "--adapter-path", tmp_path / "run", "--batch-size", 1),
        ("evaluate", *data),
    ):
        result = run(*line)
        assert_one_error(result, 1, "('<extra>') is outside")


def test_the_server_refuses_it(base):
    with serving(base, None) as server:
        for answer in (server.complete(prompt="AB <extra>"), server.chat("<extra>")):
            assert answer.status == 400
            assert re.search(SAID, answer.error["message"])
        server.assert_alive()
