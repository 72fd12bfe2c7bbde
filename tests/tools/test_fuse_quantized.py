"""Quantized bases fused: each layer by its own parameters again, or floating-point; the error said.

Oracles: MLX's dequantization of the files and sums in float64; log-probabilities read in one go.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import Segment, load
from kmerge_mlx.adapters.folder import load_adapter, save_adapter
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.tools import drift
from kmerge_mlx.tools.fuse import fuse
from tests.tiny import build, qwen2_config, random_adapter, write_base
from tests.tools.test_fuse import SCALE, made

BITS_4 = {"group_size": 32, "bits": 4}
BITS_8 = {"group_size": 64, "bits": 8}


def largest_gap(base: Path, adapter: Path, new: Path) -> tuple[float, float]:
    """Largest difference of log-probabilities after the plain and the merged sample."""
    found = []
    model, tokenizer = load(str(base), adapter)
    given = drift.sample(model, tokenizer)
    for folder, other in ((base, adapter), (new, new)):
        model, _ = load(str(folder), other)
        merged = merged_embedding(model).compress([Segment(given.merged)]).ids
        logits = [model(mx.array([ids]))[0].astype(mx.float32) for ids in (given.plain, merged)]
        found.append([np.array(x - mx.logsumexp(x, axis=-1, keepdims=True)) for x in logits])
    return tuple(abs(a - b).max() for a, b in zip(*found, strict=True))


def packings(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Bits, group size and mode of every quantized layer of a model that loads."""
    model, _ = load(str(folder))
    return {
        path: (module.bits, module.group_size, module.mode)
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("quantization", [BITS_4, BITS_8], ids=["4 bits", "8 bits"])
def test_the_printed_error_is_the_error(tmp_path, tied, quantization):
    base, adapter = made(tmp_path, tie_word_embeddings=tied, quantization=quantization)
    done = fuse(str(base), adapter, tmp_path / "new")
    plain, merged = largest_gap(base, adapter, tmp_path / "new")
    assert done.drift.plain.max == pytest.approx(plain, abs=1e-3)
    assert done.drift.merged.max == pytest.approx(merged, abs=1e-3)
    assert done.quantized
    assert plain > 1e-3  # there is one: LoRA does not lie on the grid
    before, after = packings(base), packings(tmp_path / "new")
    assert after == before | {"lm_head": before["model.embed_tokens"]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_dequantized_it_is_the_unfused_model_within_1e_3(tmp_path, tied):
    base, adapter = made(tmp_path, tie_word_embeddings=tied, quantization=BITS_4)
    done = fuse(str(base), adapter, tmp_path / "new", dequantize=True)
    assert not done.quantized
    assert max(largest_gap(base, adapter, tmp_path / "new")) < 1e-3
    assert packings(tmp_path / "new") == {}
    assert (
        not {"quantization", "quantization_config"}
        & json.loads((tmp_path / "new" / "config.json").read_text()).keys()
    )


def test_requantized_weights_are_the_nearest_to_the_sums(tmp_path):
    """Off the float64 sum by no more than half a step of each group, whose scale is in the file."""
    base, adapter = made(tmp_path, quantization=BITS_4)
    fuse(str(base), adapter, tmp_path / "new")
    before, after = (mx.load(str(p / "model.safetensors")) for p in (base, tmp_path / "new"))
    parts = load_adapter(adapter)
    lora = parts.tuning_weights | {f"lm_head.{n}": a for n, a in parts.head_weights.items()}

    def floats(stored: dict, name: str) -> np.ndarray:
        return np.array(mx.dequantize(*(stored[f"{name}.{part}"] for part in PARTS), 32, 4))

    modules = sorted({name.rsplit(".", 1)[0] for name in lora})
    for name in modules:
        a, b = (np.array(lora[f"{name}.{part}"], np.float64) for part in ("lora_a", "lora_b"))
        table = "model.embed_tokens" if name == "lm_head" else name
        wanted = floats(before, table) + SCALE * (a @ b).T
        step = np.abs(np.array(after[f"{name}.scales"])).repeat(32, axis=1)
        off = np.abs(floats(after, name) - wanted)
        assert (off <= 0.51 * step + 1e-6).mean() > 0.98  # MLX moves a group's end to hold zero
        assert (off <= 1.01 * step + 1e-6).all()
    assert len(modules) == 7


PARTS = ("weight", "scales", "biases")


def test_every_layer_keeps_parameters_of_its_own(tmp_path):
    """A mixed base: one layer at 8 bits, the table not quantized, the rest at 4 bits."""
    config, own = qwen2_config(), {"group_size": 32, "bits": 8, "mode": "affine"}
    mixed = "model.layers.0.self_attn.q_proj"
    config["quantization"] = {**BITS_4, mixed: own, "model.embed_tokens": False}
    model = build(config)
    nn.quantize(
        model,
        **BITS_4,
        class_predicate=lambda p, m: (
            own if p == mixed else hasattr(m, "to_quantized") and p != "model.embed_tokens"
        ),
    )
    base = write_base(tmp_path / "base", qwen2_config())
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (base / "config.json").write_text(json.dumps(config))
    save_adapter(random_adapter(build(qwen2_config()), 4), tmp_path / "adapter")
    fuse(str(base), tmp_path / "adapter", tmp_path / "new")
    found = packings(tmp_path / "new")
    assert found == packings(base)
    assert found[mixed] == (8, 32, "affine")
    assert "lm_head" not in found  # made of a table that is not quantized


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_other_modes_come_back_in_their_own(tmp_path, mode):
    quantization = {"mode": mode, "group_size": 16 if mode == "nvfp4" else 32}
    quantization["bits"] = 8 if mode == "mxfp8" else 4
    base, adapter = made(tmp_path, quantization=quantization)
    done = fuse(str(base), adapter, tmp_path / "new")
    before, after = packings(base), packings(tmp_path / "new")
    assert after == before | {"lm_head": before["model.embed_tokens"]}
    assert done.drift.plain.max == pytest.approx(
        largest_gap(base, adapter, tmp_path / "new")[0], abs=1e-2
    )
