"""A base and its adapter as one model: what its weights are, and that it says the same.

Oracles: sums in float64 and MLX's dequantization for the weights; the base with its adapter for the
log-probabilities. Tolerance of these: 1e-3 in float32 (seen: under 5e-5, the order of summation).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import Segment, generate, load
from kmerge_mlx.adapters import lora
from kmerge_mlx.adapters.folder import Adapter, load_adapter, save_adapter
from kmerge_mlx.adapters.schema import EncoderConfig, LoRAConfig, LoRASpec, MergeConfig
from kmerge_mlx.base import is_tied, read_config
from kmerge_mlx.errors import AdapterError, ModelError
from kmerge_mlx.model import adapter_of, attach, load_source, output_head, wire
from kmerge_mlx.source import Source
from kmerge_mlx.tools.fuse import Fused, fused
from tests.adapters.test_full import full_adapter
from tests.cli_runner import change_json, environment
from tests.reference.make_checkpoints import ARCHITECTURES, make_base
from tests.tiny import EXPERTS, PAD, build, qwen2_config, random_adapter, write_base
from tests.tools.models import (
    alone,
    fuse_folders,
    gap,
    log_probabilities,
    made,
    weights,
)

SCALE = 2.0  # of tests.tiny.random_adapter
TABLE = "model.embed_tokens"
BITS_4 = {"group_size": 32, "bits": 4}


@pytest.mark.parametrize(
    ("tied", "k", "options"),
    [
        *((True, 3, {"modules": True}), (True, 4, {"head": False}), (False, 4, {})),
        *((True, 1, {}), (False, 1, {"modules": True})),
    ],
)
def test_fused_and_unfused_agree_within_1e_3(tmp_path, tied, k, options):
    base, adapter = made(tmp_path, k, tie_word_embeddings=tied, **options)
    done = fuse_folders(base, adapter, tmp_path / "new")
    assert gap(base, adapter, tmp_path / "new", merge=False) < 1e-3
    assert done.drift.plain.max < 1e-3
    assert (tmp_path / "new" / "kmerge").exists() is (done.drift.merged is not None) is (k > 1)
    if k > 1:
        assert gap(base, adapter, tmp_path / "new", merge=True) < 1e-3
        assert done.drift.merged.max < 1e-3
        assert done.drift.embeddings_max == 0
    assert (done.merge_factor, done.untied) == (k, tied and options.get("head", True))
    assert is_tied(read_config(tmp_path / "new")) is (tied and not done.untied)
    # A LoRA that did nothing would agree as well.
    alone = log_probabilities(base, None, merge=False)
    assert abs(alone - log_probabilities(tmp_path / "new", None, merge=False)).max() > 0.1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fused_weights_are_the_sums_in_float64(tmp_path, tied):
    base, adapter = made(tmp_path, modules=True, tie_word_embeddings=tied)
    fuse_folders(base, adapter, tmp_path / "new")
    before, after, parts = weights(base), weights(tmp_path / "new"), load_adapter(adapter)
    scales = {name: spec.scale for name, spec in parts.tuning.modules.items()}
    found = {name: np.array(array, np.float64) for name, array in parts.tuning_weights.items()}
    found |= {f"lm_head.{n}": np.array(a, np.float64) for n, a in parts.head_weights.items()}
    scales["lm_head"] = SCALE
    wanted = dict(before)
    if tied:
        wanted["lm_head.weight"] = before[f"{TABLE}.weight"]
    for name, scale in scales.items():
        delta = scale * (found[f"{name}.lora_a"] @ found[f"{name}.lora_b"]).T
        wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + delta
    assert after.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert np.array_equal(after[f"{TABLE}.weight"], before[f"{TABLE}.weight"])


def test_a_fused_folder_reloads_bit_for_bit_and_carries_the_encoder(tmp_path):
    base, adapter = made(tmp_path)
    model, _, config = load_source(Source.find(str(base), adapter), fold=False)
    wanted = dict(tree_flatten(fused(model, config, "base")[0].parameters()))
    fuse_folders(base, adapter, tmp_path / "new")
    loaded, _ = alone(tmp_path / "new")
    found = dict(tree_flatten(loaded.parameters()))
    assert found.keys() == wanted.keys()
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    before, after = load_adapter(adapter), load_adapter(tmp_path / "new")
    for name, array in before.encoder_weights.items():
        assert mx.array_equal(after.encoder_weights[name], array)
    assert (after.tuning_weights, after.head_weights, after.merge.head_lora) == ({}, {}, None)
    assert after.merge.layout == before.merge.layout
    assert after.merge.base.fields["tie_word_embeddings"] is False
    assert after.merge.provenance["adapter"] == adapter.name
    assert after.merge.provenance["base_model"] == base.name
    assert after.merge.provenance["fused_by"].startswith("kmerge-mlx ")
    texts = [file.read_text() for file in (tmp_path / "new").rglob("*.json")]
    assert not any(str(tmp_path) in text for text in texts)  # the folder may be given away
    # Once more, with nothing left to fuse: the same files.
    fuse_folders(tmp_path / "new", tmp_path / "new", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "kmerge/merge_encoder.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_whole_layers_take_the_bases_place(tmp_path):
    base = write_base(tmp_path / "base", qwen2_config())
    save_adapter(full_adapter(1, head=True), tmp_path / "adapter")
    fuse_folders(base, tmp_path / "adapter", tmp_path / "new")
    assert gap(base, tmp_path / "adapter", tmp_path / "new", merge=True) < 1e-3
    found = weights(tmp_path / "new")
    for name, array in load_adapter(tmp_path / "adapter").tuning_weights.items():
        assert np.array_equal(found[name], np.array(array))


def in_half(base: Path, dtype: mx.Dtype) -> None:
    stored = mx.load(str(base / "model.safetensors"))
    half = {name: array.astype(dtype) for name, array in stored.items()}
    mx.save_safetensors(str(base / "model.safetensors"), half)


def test_half_precision_stays_and_weights_that_overflow_leave_nothing(tmp_path):
    base, adapter = made(tmp_path)
    in_half(base, mx.bfloat16)
    fuse_folders(base, adapter, tmp_path / "new")
    found = mx.load(str(tmp_path / "new" / "model.safetensors"))
    assert {array.dtype for array in found.values()} == {mx.bfloat16}
    in_half(base, mx.float16)
    large = load_adapter(adapter)
    for name, array in large.tuning_weights.items():
        if "down_proj" in name:
            large.tuning_weights[name] = array * 3e4
    save_adapter(large, adapter)
    with pytest.raises(ModelError, match="log-probabilities that are not finite"):
        fuse_folders(base, adapter, tmp_path / "large")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "new"]


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("gemma2", "no output head of their own"), ("minicpm3", "compute something else")],
)
def test_a_class_whose_head_cannot_be_its_own_is_refused_by_name(model_type, why):
    rope = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    options = {"head_dim": 32, "scale_depth": 1.4, "dim_model_base": 16, "scale_emb": 1.0}
    options |= {"q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
    options |= {"kv_lora_rank": 16, "v_head_dim": 32}
    options["rope_scaling"] = rope | {"original_max_position_embeddings": 64}
    config = qwen2_config(model_type=model_type, **options)
    model = build(config)
    attach(model, random_adapter(model, 4, keys=("mlp.down_proj",)), PAD)
    with pytest.raises(ModelError, match=why) as error:
        fused(model, config, "this")
    assert f"mlx-lm's {model_type} models" in str(error.value)


def test_what_is_read_is_never_replaced_and_force_replaces_only_a_model(tmp_path):
    home, new = tmp_path / "home", tmp_path / "home" / "new"
    base, adapter = made(home)
    (tmp_path / "other").mkdir()
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    for target in (base, adapter, home):
        with pytest.raises(ModelError, match=r"`save_path` .* would replace .*, which is read"):
            fuse_folders(base, adapter, target, force=True)
    fuse_folders(base, adapter, new)
    fuse_folders(base, adapter, new, force=True)
    for made_of, target, force, said in (
        ((base, adapter), new, False, "exists: choose another folder"),
        ((base, adapter), tmp_path / "other", True, "is not a folder of model files"),
        ((new, new), new, True, "which is read"),
    ):
        with pytest.raises(ModelError, match=said):
            fuse_folders(*made_of, target, force=force)
    for extra, kind in ((new / "kmerge/notes.md", AdapterError), (new / "thesis.pdf", ModelError)):
        extra.write_text("mine")
        with pytest.raises(kind, match=extra.name):
            fuse_folders(base, adapter, new, force=True)
        extra.unlink()
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_mlx_lm_runs_a_fused_folder_as_it_is(tmp_path):
    base, adapter = made(tmp_path)
    fuse_folders(base, adapter, tmp_path / "new")
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tmp_path / "new")]
    command += ["--prompt", "One two three", "-m", "8", "--temp", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(str(base), adapter)
    prompt = [Segment(tokenizer.encode("One two three"), False)]
    wanted = generate(model, tokenizer, prompt, max_tokens=8)
    assert wanted
    assert done.stdout.split("==========")[1].strip() == wanted.strip()


def fused_with_everything(base: Path, home: Path, **options: object) -> Fused:
    """Fuses random LoRA on everything that mlx-lm puts it on, and on the head."""
    model, _ = load(str(base))
    spec = LoRASpec(4, 2.0)
    merge = MergeConfig(EncoderConfig(3, 64, 128), pad_token_id=PAD, head_lora=spec)
    tuning = LoRAConfig(len(model.layers), 0.0, spec, lora.default_keys(model))
    wire(model, merge, tuning, PAD)
    fresh = adapter_of(model, merge, tuning)
    mx.random.seed(1)
    parts = (fresh.tuning_weights, fresh.encoder_weights, fresh.head_weights)
    random = [{n: mx.random.normal(a.shape, scale=0.1) for n, a in part.items()} for part in parts]
    save_adapter(Adapter(merge, tuning, *random), home / "adapter")
    return fuse_folders(base, home / "adapter", home / "fused", **options)


def assert_same(done: Fused) -> None:
    assert max(done.drift.plain.max, done.drift.merged.max) < 1e-3
    assert done.drift.plain.same > 0.99


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_we_claim_says_the_same_when_fused(tmp_path, name):
    (tmp_path / "base").mkdir()
    make_base(tmp_path / "base", name)
    done = fused_with_everything(tmp_path / "base", tmp_path)
    assert_same(done)
    assert done.untied == ARCHITECTURES[name].tied
    assert output_head(load(str(tmp_path / "fused"))[0]) is not None


def test_a_nested_config_is_untied_where_the_model_reads_it(tmp_path):
    config = {"model_type": "mistral3", "text_config": qwen2_config(model_type="llama")}
    done = fused_with_everything(write_base(tmp_path / "base", config), tmp_path)
    assert_same(done)
    assert done.untied
    written = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert written["text_config"]["tie_word_embeddings"] is False
    assert output_head(load(str(tmp_path / "fused"))[0])[0] == "language_model.lm_head"


@pytest.mark.parametrize("quantization", [{}, {"quantization": BITS_4}])
def test_lora_on_experts_is_fused_too(tmp_path, quantization):
    base = write_base(tmp_path / "base", qwen2_config(**EXPERTS, **quantization))
    assert_same(fused_with_everything(base, tmp_path, dequantize=bool(quantization)))


def packings(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Bits, group size and mode of every quantized layer of a model that loads."""
    modules = alone(folder)[0].named_modules()
    return {p: (m.bits, m.group_size, m.mode) for p, m in modules if hasattr(m, "bits")}


@pytest.mark.parametrize(("mode", "group_size", "bits"), [("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_quantized_layers_come_back_in_their_own_packing(tmp_path, mode, group_size, bits):
    packing = {"group_size": group_size, "bits": bits, "mode": mode}
    base, adapter = made(tmp_path, quantization=packing)
    done = fuse_folders(base, adapter, tmp_path / "new")
    before, after = packings(base), packings(tmp_path / "new")
    assert after == before | {"lm_head": before[TABLE]}
    assert done.quantized
    assert done.drift.plain.max > 1e-3  # LoRA does not lie on the grid


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_dequantized_it_is_the_unfused_model_within_1e_3(tmp_path, tied):
    base, adapter = made(tmp_path, tie_word_embeddings=tied, quantization=BITS_4)
    done = fuse_folders(base, adapter, tmp_path / "new", dequantize=True)
    assert_same(done)
    assert (done.quantized, packings(tmp_path / "new")) == (False, {})
    assert not {"quantization", "quantization_config"} & read_config(tmp_path / "new").keys()


def test_every_layer_keeps_parameters_of_its_own(tmp_path):
    """A mixed base: one layer at 8 bits, the table not quantized, the rest at 4 bits."""
    own, mixed = {"group_size": 32, "bits": 8, "mode": "affine"}, "model.layers.0.self_attn.q_proj"
    base, adapter = made(tmp_path)
    model, _ = alone(base)

    def chosen(path: str, module: nn.Module) -> object:
        return own if path == mixed else hasattr(module, "to_quantized") and path != TABLE

    nn.quantize(model, **BITS_4, class_predicate=chosen)
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    change_json(base / "config.json", quantization={**BITS_4, mixed: own, TABLE: False})
    fuse_folders(base, adapter, tmp_path / "new")
    found = packings(tmp_path / "new")
    assert found == packings(base)
    assert found[mixed] == (8, 32, "affine")
    assert "lm_head" not in found  # made of a table that is not quantized
