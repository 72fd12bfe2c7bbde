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
from kmerge_mlx.model import merged_embedding
from tests import conversions
from tests.checkpoints import PREFIX, make
from tests.conversions import convert, refused
from tests.tiny import build, qwen2_config, write_base

tied = conversions.tied


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    config = qwen2_config(tie_word_embeddings=False)
    return write_base(tmp_path_factory.mktemp("untied"), config)


# ---- the head ----


@pytest.mark.parametrize("known", [True, False])
def test_the_head_of_a_tied_or_unknown_base_lies_beside_the_encoder(tmp_path, tied, known):
    path = convert(tmp_path, make(), model=str(tied) if known else None)
    assert {"lm_head.lora_a", "lm_head.lora_b"} <= set(
        load_file(path / "merge_encoder.safetensors")
    )
    assert not [n for n in load_file(path / "adapters.safetensors") if "lm_head" in n]
    model, _ = load(str(tied), path)
    assert "lora_a" in merged_embedding(model)


def test_the_head_of_an_untied_base_lies_with_the_other_lora(tmp_path, untied):
    path = convert(tmp_path, make(), model=str(untied))
    assert {"lm_head.lora_a", "lm_head.lora_b"} <= set(load_file(path / "adapters.safetensors"))
    assert not [n for n in load_file(path / "merge_encoder.safetensors") if "lm_head" in n]


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


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0]},
        {"rank_pattern": {"layers.1.mlp.down_proj": 2}},
        {"alpha_pattern": {"v_proj": 3}},
    ],
)
def test_mlx_lm_refuses_a_lora_it_has_no_schema_for_instead_of_misreading_it(
    tmp_path, tied, options
):
    made = make(head=False, **options)
    if "layers_to_transform" in options:
        made.adapter = {n: a for n, a in made.adapter.items() if ".layers.0." in n}
    if "rank_pattern" in options:
        name = f"{PREFIX}model.layers.1.mlp.down_proj.lora_"
        made.adapter[f"{name}A.weight"] = made.adapter[f"{name}A.weight"][:2].copy()
        made.adapter[f"{name}B.weight"] = made.adapter[f"{name}B.weight"][:, :2].copy()
    path = convert(tmp_path, made, model=str(tied))
    with pytest.raises(KeyError, match="missing required key 'scale'"):
        mlx_lm.utils.load_adapters(build(qwen2_config()), str(path))
    assert load(str(tied), path)


# ---- the base ----


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"d": 32}, "has hidden_size 64, the encoder has 32"),
        ({"vocab_size": 800}, "has vocab_size 700, lm_head's LoRA has 800"),
        ({"layers": 3}, "has 2 layers, the LoRA covers 3"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_by_name(tmp_path, tied, untied, options, complaint):
    for base in (tied, untied):
        text = refused(tmp_path, make(**options), model=str(base))
        assert f"`model` {base} {complaint}" in text


def test_a_head_that_does_not_fit_the_encoder_is_refused_without_a_base(tmp_path):
    made = make()
    wide = make(d=80)
    made.adapter |= {n: a for n, a in wide.adapter.items() if "lm_head" in n}
    assert "lm_head's LoRA reads 80 features, the encoder writes 64" in refused(tmp_path, made)


def test_a_base_that_cannot_be_read_is_the_models_error(tmp_path, tied):
    broken = tmp_path / "broken"
    shutil.copytree(tied, broken)
    (broken / "tokenizer.json").write_text("{")
    for model in (tmp_path / "absent", broken, tmp_path):
        assert "\n" not in refused(tmp_path, make(), kind=ModelError, model=str(model))


def test_a_gemma_base_is_refused_by_name(tmp_path):
    """It scales embeddings inside the model, so the paper's checkpoints for it do not convert."""
    base = write_base(tmp_path / "base", qwen2_config(model_type="gemma3_text"))
    text = refused(tmp_path, make(), model=str(base))
    assert "scales embeddings inside the model" in text
