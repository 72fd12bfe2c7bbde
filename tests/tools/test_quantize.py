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
from kmerge_mlx.adapters.schema import EncoderConfig, EncoderQuantization, QuantizeConfig
from kmerge_mlx.errors import AdapterError, ModelError
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.tools import drift
from kmerge_mlx.tools.fuse import fuse
from kmerge_mlx.tools.quantize import quantize
from tests.adapters.test_full import full_adapter
from tests.tiny import build, prompts_of, qwen2_config, random_adapter, write_base
from tests.tools.test_fuse import made

LAYERS = ("w1", "w2", "w3")


def stored(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_are_mlx_lms_and_the_table_is_left_alone(tmp_path, capsys, tied, bits):
    base, adapter = made(tmp_path, tie_word_embeddings=tied)
    done = quantize(str(base), tmp_path / "new", QuantizeConfig(bits), adapter)
    whole = quantize(str(base), tmp_path / "all", QuantizeConfig(bits, embedding=True), adapter)
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


def test_the_adapter_comes_along_bit_for_bit(tmp_path):
    base, adapter = made(tmp_path)
    quantize(str(base), tmp_path / "new", adapter_path=adapter)
    before, after = load_adapter(adapter), load_adapter(tmp_path / "new")
    for part in ("tuning_weights", "encoder_weights", "head_weights"):
        assert same(getattr(before, part), getattr(after, part))
    assert after.tuning == before.tuning
    assert after.merge.encoder == before.merge.encoder
    assert after.merge.provenance["quantized_by"].startswith("kmerge-mlx ")


@pytest.mark.parametrize("embedding", [True, False], ids=["table", "no table"])
def test_the_drift_is_what_numpy_says(tmp_path, embedding):
    base, adapter = made(tmp_path)
    config = QuantizeConfig(4, embedding=embedding, encoder_bits=8)
    text = "Tree: JN\n+WO\n++UP\n" * 12
    done = quantize(str(base), tmp_path / "new", config, adapter, text=text)
    rows, said = [], []
    for folder, other in ((base, adapter), (tmp_path / "new", tmp_path / "new")):
        model, tokenizer = load(str(folder), other)
        embedding_of = merged_embedding(model)
        ids = embedding_of.compress([Segment(tokenizer.encode(text))]).ids
        rows.append(np.array(embedding_of(mx.array(ids)), np.float64))
        logits = np.array(model(mx.array([ids]))[0], np.float64)
        said.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    moved = np.linalg.norm(rows[1] - rows[0], axis=1) / np.linalg.norm(rows[0], axis=1)
    found = done.drift.embeddings
    assert found.blocks == len(moved) > 20
    assert (found.mean, found.worst) == pytest.approx((moved.mean(), moved.max()), rel=1e-3)
    assert found.mean > 0.01 if embedding else found.mean < 0.01
    gap = done.drift.merged
    assert gap.positions == len(moved)
    assert gap.max == pytest.approx(abs(said[1] - said[0]).max(), abs=1e-3)
    assert gap.mean == pytest.approx(abs(said[1] - said[0]).mean(), rel=1e-2)
    assert gap.same == (said[0].argmax(-1) == said[1].argmax(-1)).mean()


def test_a_base_alone_is_quantized_too(tmp_path):
    base = write_base(tmp_path / "base", qwen2_config())
    done = quantize(str(base), tmp_path / "new")
    assert (done.merge_factor, done.drift.merged) == (None, None)
    assert not (tmp_path / "new" / "kmerge").exists()


def test_a_fused_model_is_quantized_with_its_encoder_and_the_other_way_round(tmp_path):
    base, adapter = made(tmp_path)
    fuse(str(base), adapter, tmp_path / "fused")
    done = quantize(str(tmp_path / "fused"), tmp_path / "small", None, tmp_path / "fused")
    assert (done.tied, done.merge_factor) == (False, 4)
    quantize(str(base), tmp_path / "q", None, adapter)
    fuse(str(tmp_path / "q"), tmp_path / "q", tmp_path / "qf")
    assert load_adapter(tmp_path / "qf").tuning_weights == {}


# The merge encoder at 8 bits


@pytest.fixture
def packed(tmp_path):
    """A quantized base whose adapter's encoder is packed, and the adapter that it was made from."""
    base, adapter = made(tmp_path)
    quantize(str(base), tmp_path / "new", QuantizeConfig(encoder_bits=8), adapter)
    return tmp_path / "new", load_adapter(adapter)


def test_packed_weights_are_the_nearest_of_256_in_their_group(packed):
    folder, before = packed
    after = load_adapter(folder)
    sizes = after.merge.encoder
    assert sizes.quantization == EncoderQuantization(8, 64)
    assert {n: tuple(a.shape) for n, a in after.encoder_weights.items()} == sizes.shapes()
    for layer, (out, inner) in sizes.layers().items():
        parts = [
            after.encoder_weights[f"{layer}.{part}"] for part in ("weight", "scales", "biases")
        ]
        bytes_, scales, biases = (np.array(part) for part in parts)
        numbers = bytes_.view(np.uint8).reshape(out, inner // 64, 64)  # little-endian words
        wide = numbers * scales[..., None].astype(np.float64) + biases[..., None]
        wanted = np.array(before.encoder_weights[f"{layer}.weight"]).reshape(wide.shape)
        assert (abs(wide - wanted) <= 1.01 * abs(scales[..., None])).all()
        bias = f"{layer}.bias"
        assert mx.array_equal(after.encoder_weights[bias], before.encoder_weights[bias])


def test_a_packed_encoder_computes_with_its_packed_numbers(packed):
    folder, _ = packed
    weights = load_adapter(folder).encoder_weights
    model, _ = load(str(folder), folder)
    embedding, ids = merged_embedding(model), prompts_of(1, low=4, high=4)[0]
    e = np.array(embedding.embedding(mx.array(ids)), np.float64)

    def layer(name: str, x: np.ndarray) -> np.ndarray:
        parts = (weights[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        return np.array(mx.dequantize(*parts, 64, 8), np.float64) @ x + weights[f"{name}.bias"]

    hidden = np.maximum(layer("w1", e.reshape(-1)), 0)
    wanted = e.mean(0) + layer("w3", np.maximum(layer("w2", hidden), 0))
    found = embedding(mx.array(embedding.compress([Segment(ids)]).ids))[0]
    np.testing.assert_allclose(np.array(found), wanted, atol=1e-4)


def test_a_packed_encoder_reloads_bit_for_bit(packed, tmp_path):
    adapter = load_adapter(packed[0])
    save_adapter(adapter, tmp_path / "again")
    for name in ("merge_config.json", "merge_encoder.safetensors", "adapters.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (
            packed[0] / "kmerge" / name
        ).read_bytes()


def broken(folder: Path, **changes: object) -> str:
    """What is said when tensors of a packed encoder are changed, or taken out (None)."""
    path = folder / "kmerge" / "merge_encoder.safetensors"
    tensors = mx.load(str(path))
    mx.eval(tensors)
    for name, change in changes.items():
        name = f"encoder.{name.replace('_', '.')}"
        old = tensors.pop(name)
        if change is not None:
            tensors[name] = change(old)
    path.unlink()
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(AdapterError) as error:
        load_adapter(folder)
    return str(error.value)


def test_everything_wrong_with_a_packed_encoder_is_listed(packed):
    said = broken(
        packed[0],
        w1_weight=lambda a: a.astype(mx.float32),
        w1_bias=lambda a: a.astype(mx.uint32),
        w2_scales=None,
        w3_biases=lambda a: a[:1],
    )
    assert ": 4 problems" in said
    assert "encoder.w1.weight has dtype mlx.core.float32, expected mlx.core.uint32" in said
    assert "encoder.w1.bias has dtype mlx.core.uint32, expected a floating-point dtype" in said
    assert "encoder.w2.scales is missing, expected shape (256, 8)" in said
    assert "encoder.w3.biases has shape (1, 4), expected (64, 4)" in said


def test_packed_numbers_without_the_entry_are_refused(packed):
    path = packed[0] / "kmerge" / "merge_config.json"
    config = json.loads(path.read_text())
    del config["encoder_quantization"]
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"encoder\.w1\.weight has dtype U32"):
        load_adapter(packed[0])


@pytest.mark.parametrize(
    "entry",
    [
        *(8, [], {}, {"bits": 8}, {"bits": 7, "group_size": 64}),
        *({"bits": True, "group_size": 64}, {"bits": 8, "group_size": 0}),
        *({"bits": 8, "group_size": 64.0}, {"bits": "8", "group_size": 64}),
        *({"bits": 8, "group_size": 64, "mode": "affine"}, {"bits": [8], "group_size": 64}),
    ],
)
def test_an_entry_that_says_nothing_known_is_refused(packed, entry):
    path = packed[0] / "kmerge" / "merge_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_quantization": entry}))
    with pytest.raises(AdapterError, match="encoder_quantization") as error:
        load_adapter(packed[0])
    assert "\n" not in str(error.value)


def test_groups_that_do_not_divide_the_encoder_are_refused():
    with pytest.raises(AdapterError, match="w2 reads 12 numbers, expected whole groups of 32"):
        EncoderConfig(4, 8, 12, 0, EncoderQuantization(8, 32))
    with pytest.raises(AdapterError, match="reads 12, 32 numbers, and none of MLX's groups"):
        EncoderQuantization.of_width(8, [32, 12, 32])
    assert EncoderQuantization.of_width(8, [96, 32]).group_size == 32


def test_unpacked_adapters_are_written_as_before(tmp_path):
    _, adapter = made(tmp_path)
    assert "encoder_quantization" not in json.loads((adapter / "merge_config.json").read_text())
    null = json.loads((adapter / "merge_config.json").read_text()) | {"encoder_quantization": None}
    (adapter / "merge_config.json").write_text(json.dumps(null))
    assert load_adapter(adapter).merge.encoder.quantization is None


# What is refused


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(tmp_path):
    base, adapter = made(tmp_path)
    quantize(str(base), tmp_path / "q", QuantizeConfig(encoder_bits=8), adapter)
    narrow = write_base(tmp_path / "narrow", qwen2_config(intermediate_size=96))
    save_adapter(full_adapter(1), tmp_path / "full")
    save_adapter(random_adapter(build(qwen2_config()), 1), tmp_path / "one")
    shutil.copytree(tmp_path / "q" / "kmerge", tmp_path / "packed")
    before = sorted(tmp_path.iterdir())
    eight = QuantizeConfig(encoder_bits=8)
    cases = [
        (
            tmp_path / "q",
            None,
            QuantizeConfig(),
            ModelError,
            "is quantized already: give the model",
        ),
        (base, tmp_path / "full", QuantizeConfig(), AdapterError, "run `kmerge-mlx fuse` first"),
        (base, None, eight, AdapterError, "--encoder-bits needs a merge encoder, found no adapter"),
        (base, tmp_path / "one", eight, AdapterError, "found an adapter for K = 1, which has none"),
        (base, None, QuantizeConfig(7), ModelError, "MLX cannot quantize .* so: "),
        (base, None, QuantizeConfig(4, 48), ModelError, "MLX cannot quantize .* so: "),
        (narrow, None, QuantizeConfig(4, 128), ModelError, "divide: give another --q-group-size"),
        (base, None, QuantizeConfig(8, mode="mxfp4"), ModelError, "MLX cannot quantize .* so: "),
        (base, None, QuantizeConfig(mode="gptq"), ModelError, "MLX cannot quantize .* so: "),
    ]
    for source, other, config, kind, said in cases:
        with pytest.raises(kind, match=said) as error:
            quantize(str(source), tmp_path / "new", config, other)
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(AdapterError, match="to 8 bits, and cannot be quantized again: take the"):
        quantize(str(base), tmp_path / "new", eight, tmp_path / "packed")


def test_an_encoder_that_is_packed_stays_so_when_the_lora_is_fused(tmp_path):
    base, adapter = made(tmp_path)
    quantize(str(base), tmp_path / "q", QuantizeConfig(encoder_bits=8), adapter)
    done = fuse(str(tmp_path / "q"), tmp_path / "q", tmp_path / "f")
    before, after = load_adapter(tmp_path / "q"), load_adapter(tmp_path / "f")
    assert same(before.encoder_weights, after.encoder_weights)
    assert after.merge.encoder.quantization == EncoderQuantization(8, 64)
    assert done.drift.embeddings.worst == 0


def test_a_short_text_is_compared_whole_and_a_long_one_within_bounds(tmp_path, monkeypatch):
    base, adapter = made(tmp_path)
    model, tokenizer = load(str(base), adapter)
    short = drift.sample(model, tokenizer, "One two three")
    assert short.plain == short.merged == tokenizer.encode("One two three")
    given = drift.sample(model, tokenizer, "One two three four. " * 2000)
    assert (len(given.plain), len(given.merged)) == (512, 4 * 512)
    assert drift.sample(model, tokenizer) == drift.sample(model, tokenizer)
    monkeypatch.setattr(drift, "DRIFT_BYTES", 100 * 4 * 700)
    assert len(drift.sample(model, tokenizer).plain) == 50
    read = drift.read(model, drift.sample(model, tokenizer))
    kept = sum(chunk.nbytes for chunk in [*read.plain, *read.merged])
    assert kept == 100 * 4 * 700
    model.context_length = 7
    assert len(drift.sample(model, tokenizer).plain) == 7
