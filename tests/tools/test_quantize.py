"""A base quantized for merging: which layers, what is carried, what is said, what is refused.

Oracles: ``mlx_lm.convert -q`` for the layers, numpy for packed numbers and for the drift.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import convert as mlx_convert

from kmerge_mlx import Segment, load
from kmerge_mlx.adapters.folder import load_adapter, save_adapter
from kmerge_mlx.adapters.packing import EncoderQuantization
from kmerge_mlx.errors import AdapterError, ModelError
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.tools.quantize import Packing
from tests.adapters.test_full import full_adapter
from tests.conversions import assert_same_tensors
from tests.tiny import build, prompts_of, qwen2_config, random_adapter, write_base
from tests.tools.models import TEXT, fuse_folders, made, quantize_folders


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base, its adapter, and both quantized with a packed encoder: read-only."""
    home = tmp_path_factory.mktemp("home")
    quantize_folders(*made(home), home / "q", encoder_bits=8)
    return home


def stored(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("tied", "bits"), [(True, 4), (False, 8)])
def test_layers_are_mlx_lms_and_the_table_is_left_alone(tmp_path, capsys, tied, bits):
    base, adapter = made(tmp_path, tie_word_embeddings=tied)
    done = quantize_folders(base, adapter, tmp_path / "new", Packing(bits))
    whole = quantize_folders(base, adapter, tmp_path / "all", Packing(bits, embedding=True))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    mlx_convert(str(base), str(tmp_path / "theirs"), quantize=True, q_bits=bits)
    theirs, ours = stored(tmp_path / "theirs"), stored(tmp_path / "new")
    assert same(stored(tmp_path / "all"), theirs)
    table = "model.embed_tokens"
    assert mx.array_equal(ours.pop(f"{table}.weight"), stored(base)[f"{table}.weight"])
    for part in ("weight", "scales", "biases"):
        del theirs[f"{table}.{part}"]
    assert same(ours, theirs)
    assert whole.bits_per_weight < done.bits_per_weight
    assert (done.tied, done.merge_factor) == (tied, 4)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": bits, "mode": "affine"}


def test_the_adapter_comes_along_bit_for_bit_and_a_base_alone_needs_none(tmp_path):
    base, adapter = made(tmp_path)
    quantize_folders(base, adapter, tmp_path / "new")
    before, after = load_adapter(adapter), load_adapter(tmp_path / "new")
    assert_same_tensors(after, before)
    assert (after.tuning, after.merge.encoder) == (before.tuning, before.merge.encoder)
    assert after.merge.provenance["quantized_by"].startswith("kmerge-mlx ")
    done = quantize_folders(base, None, tmp_path / "alone")
    assert (done.merge_factor, done.drift.merged) == (None, None)
    assert not (tmp_path / "alone" / "kmerge").exists()


@pytest.mark.parametrize("embedding", [True, False], ids=["table", "no table"])
def test_the_drift_is_what_numpy_says(tmp_path, embedding):
    base, adapter = made(tmp_path)
    packing = Packing(4, embedding=embedding)
    done = quantize_folders(base, adapter, tmp_path / "new", packing, encoder_bits=8)
    rows, said = [], []
    for folder, other in ((base, adapter), (tmp_path / "new", tmp_path / "new")):
        model, tokenizer = load(str(folder), other)
        embedding_of = merged_embedding(model)
        ids = embedding_of.compress([Segment(tokenizer.encode(TEXT))]).ids
        rows.append(np.array(embedding_of(mx.array(ids)), np.float64))
        logits = np.array(model(mx.array([ids]))[0], np.float64)
        said.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    moved = np.linalg.norm(rows[1] - rows[0], axis=1) / np.linalg.norm(rows[0], axis=1)
    found = done.drift
    assert found.blocks == len(moved) > 20
    assert found.embeddings_mean == pytest.approx(moved.mean(), rel=1e-3)
    assert found.embeddings_max == pytest.approx(moved.max(), rel=1e-3)
    assert (found.embeddings_mean > 0.01) is embedding
    gap = done.drift.merged
    assert gap.positions == len(moved)
    assert gap.max == pytest.approx(abs(said[1] - said[0]).max(), abs=1e-3)
    assert gap.mean == pytest.approx(abs(said[1] - said[0]).mean(), rel=1e-2)
    assert gap.same == (said[0].argmax(-1) == said[1].argmax(-1)).mean()


def test_a_fused_model_is_quantized_with_its_encoder_and_the_other_way_round(home, tmp_path):
    fuse_folders(home / "base", home / "adapter", tmp_path / "fused")
    done = quantize_folders(tmp_path / "fused", tmp_path / "fused", tmp_path / "small")
    assert (done.tied, done.merge_factor) == (False, 4)
    done = fuse_folders(home / "q", home / "q", tmp_path / "qf")
    before, after = load_adapter(home / "q"), load_adapter(tmp_path / "qf")
    assert after.tuning_weights == {}
    assert same(before.encoder_weights, after.encoder_weights)
    assert after.merge.encoder.quantization == EncoderQuantization(8, 64)
    assert done.drift.embeddings_max == 0


def test_a_packed_encoder_computes_with_its_packed_numbers(home):
    weights = load_adapter(home / "q").encoder_weights
    model, _ = load(str(home / "q"), home / "q")
    embedding, ids = merged_embedding(model), prompts_of(1, low=4, high=4)[0]
    e = np.array(embedding.embedding(mx.array(ids)), np.float64)

    def layer(name: str, x: np.ndarray) -> np.ndarray:
        parts = (weights[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        return np.array(mx.dequantize(*parts, 64, 8), np.float64) @ x + weights[f"{name}.bias"]

    hidden = np.maximum(layer("w1", e.reshape(-1)), 0)
    wanted = e.mean(0) + layer("w3", np.maximum(layer("w2", hidden), 0))
    found = embedding(mx.array(embedding.compress([Segment(ids)]).ids))[0]
    np.testing.assert_allclose(np.array(found), wanted, atol=1e-4)


def test_everything_wrong_with_a_packed_encoder_is_listed(home, tmp_path):
    shutil.copytree(home / "q" / "kmerge", tmp_path / "a")
    path = tmp_path / "a" / "merge_encoder.safetensors"
    tensors = {name: mx.array(np.array(array)) for name, array in mx.load(str(path)).items()}
    tensors["encoder.w1.weight"] = tensors["encoder.w1.weight"].astype(mx.float32)
    tensors["encoder.w1.bias"] = tensors["encoder.w1.bias"].astype(mx.uint32)
    tensors["encoder.w3.biases"] = tensors["encoder.w3.biases"][:1]
    del tensors["encoder.w2.scales"]
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(AdapterError, match=": 4 problems") as error:
        load_adapter(tmp_path / "a")
    for name in ("w1.weight has dtype", "w1.bias has dtype", "w2.scales is", "w3.biases has shape"):
        assert f"encoder.{name}" in str(error.value)


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(home, tmp_path):
    base, eight = home / "base", {"encoder_bits": 8}
    narrow = write_base(tmp_path / "narrow", qwen2_config(intermediate_size=96))
    save_adapter(full_adapter(1), tmp_path / "full")
    save_adapter(random_adapter(build(qwen2_config()), 1), tmp_path / "one")
    shutil.copytree(home / "q" / "kmerge", tmp_path / "packed")
    before = sorted(tmp_path.iterdir())
    for source, adapter, options, kind, said in (
        (home / "q", None, {}, ModelError, "is quantized already: give the model"),
        (base, tmp_path / "full", {}, AdapterError, "run `kmerge-mlx fuse` first"),
        (base, None, eight, AdapterError, "`encoder_bits` needs a merge encoder, found no"),
        (base, tmp_path / "one", eight, AdapterError, "found an adapter for K = 1"),
        (base, tmp_path / "packed", eight, AdapterError, "cannot be quantized again"),
        (base, None, {"packing": Packing(7)}, ModelError, "MLX cannot quantize .* so: "),
        (narrow, None, {"packing": Packing(4, 128)}, ModelError, "give another `q_group_size`"),
    ):
        with pytest.raises(kind, match=said) as error:
            quantize_folders(source, adapter, tmp_path / "new", **options)
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.iterdir()) == before
