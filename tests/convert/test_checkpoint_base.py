"""The base of a checkpoint, if it is known: where the head's LoRA goes, and what does not fit.

What loads the result beside us is mlx-lm.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from kmerge_mlx import load
from kmerge_mlx.errors import ModelError
from tests import conversions
from tests.checkpoints import make
from tests.conversions import convert, refused
from tests.tiny import build, qwen2_config, write_base

tied = conversions.tied


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    config = qwen2_config(tie_word_embeddings=False)
    return write_base(tmp_path_factory.mktemp("untied"), config)


@pytest.mark.parametrize("base", ["tied", "untied", None])
def test_the_head_lies_with_the_other_lora_only_where_the_base_is_known_untied(
    tmp_path, request, base
):
    model = request.getfixturevalue(base) if base else None
    path = convert(tmp_path, make(), model=base and str(model))
    found = [
        {name for name in load_file(path / file) if "lm_head" in name}
        for file in ("adapters.safetensors", "merge_encoder.safetensors")
    ]
    head = {"lm_head.lora_a", "lm_head.lora_b"}
    assert found == ([head, set()] if base == "untied" else [set(), head])


@pytest.mark.parametrize("head", ["tied", "untied", "untied_unknown", "untied_alone"])
def test_mlx_lm_loads_the_lora_part_of_what_was_written(tmp_path, tied, untied, head):
    """On an untied base converted with --model, that is all of it: the logits are ours."""
    base = tied if head == "tied" else untied
    made = make()
    if head == "untied_alone":
        made.config["target_modules"] = ["lm_head"]
        made.adapter = {n: a for n, a in made.adapter.items() if "lm_head" in n}
    path = convert(tmp_path, made, model=None if "unknown" in head else str(base))
    theirs = mlx_lm.utils.load_adapters(
        build(qwen2_config(tie_word_embeddings=head == "tied")), str(path)
    )
    weights = dict(tree_flatten(theirs.parameters()))
    for name, array in load_file(path / "adapters.safetensors").items():
        assert np.array(weights[name]).tobytes() == array.tobytes()
    ours, _ = load(str(base), path)
    if head in ("untied", "untied_alone"):
        theirs, _ = mlx_lm.utils.load(str(base), adapter_path=str(path))
        ids = mx.array([[5, 6, 7, 8]])
        plain, _ = mlx_lm.utils.load(str(base))
        assert mx.array_equal(ours(ids), theirs(ids))
        assert not mx.allclose(ours(ids), plain(ids))


def test_mlx_lm_refuses_a_lora_it_has_no_schema_for_instead_of_misreading_it(tmp_path, tied):
    made = make(head=False, alpha_pattern={"v_proj": 3})
    path = convert(tmp_path, made, model=str(tied))
    with pytest.raises(KeyError, match="missing required key 'scale'"):
        mlx_lm.utils.load_adapters(build(qwen2_config()), str(path))
    assert load(str(tied), path)


def test_a_base_that_cannot_be_read_is_the_models_error(tmp_path, tied):
    broken = tmp_path / "broken"
    shutil.copytree(tied, broken)
    (broken / "tokenizer.json").write_text("{")
    for model in (tmp_path / "absent", broken, tmp_path):
        assert "\n" not in refused(tmp_path, make(), kind=ModelError, model=str(model))


def test_a_base_or_a_head_that_does_not_fit_is_refused_by_name(tmp_path, tied, untied):
    for options, complaint in (
        ({"d": 32}, "has hidden_size 64, the encoder has 32"),
        ({"vocab_size": 800}, "has vocab_size 700, lm_head's LoRA has 800"),
        ({"layers": 3}, "has 2 layers, the LoRA covers 3"),
    ):
        for base in (tied, untied):
            text = refused(tmp_path, make(**options), model=str(base))
            assert f"`model` {base} {complaint}" in text
    made = make()
    made.adapter |= {n: a for n, a in make(d=80).adapter.items() if "lm_head" in n}
    assert "lm_head's LoRA reads 80 features, the encoder writes 64" in refused(tmp_path, made)
    # It scales embeddings inside the model, so the paper's checkpoints for it do not convert.
    gemma = write_base(tmp_path / "base", qwen2_config(model_type="gemma3_text"))
    text = refused(tmp_path, make(), model=str(gemma))
    assert "scales embeddings inside the model" in text
