"""A base and its adapter as one model: what its weights are, and that it says the same.

Oracles: sums in float64 for the weights; the base with its adapter for the log-probabilities.
Tolerance of these: 1e-3 in float32 (seen: under 5e-5, the order of summation).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import Segment, generate, load
from kmerge_mlx.adapters.folder import Adapter, load_adapter, save_adapter
from kmerge_mlx.adapters.schema import LoRASpec
from kmerge_mlx.adapters.tuning import LoRAConfig
from kmerge_mlx.base import is_tied, read_config
from kmerge_mlx.errors import AdapterError, ModelError
from kmerge_mlx.model import attach, merged_embedding, output_head
from kmerge_mlx.tools.fuse import _as_linear, fuse, fused
from tests.adapters.test_full import full_adapter
from tests.cli_runner import environment
from tests.tiny import PAD, build, prompts_of, qwen2_config, random_adapter, write_base

PROMPT = prompts_of(1, low=120, high=120)[0]
SCALE = 2.0  # of tests.tiny.random_adapter
TABLE = "model.embed_tokens.weight"
ROPE_OF_MINICPM3 = {
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0] * 8,
}


def by_module(adapter: Adapter) -> Adapter:
    """The same adapter, each module with a scale of its own, as rsLoRA and patterns have."""
    names = sorted({name.rsplit(".", 1)[0] for name in adapter.tuning_weights})
    specs = {name: LoRASpec(4, 4 / (1 + i) ** 0.5) for i, name in enumerate(names)}
    return replace(adapter, tuning=LoRAConfig(2, 0.0, modules=specs))


def made(
    folder: Path, k: int = 4, head: bool = True, modules: bool = False, **config: object
) -> tuple[Path, Path]:
    """A random base and a random adapter for it."""
    config = qwen2_config(**config)
    base = write_base(folder / "base", config)
    plain = {name: value for name, value in config.items() if name != "quantization"}
    adapter = random_adapter(build(plain), k, head=head)
    save_adapter(by_module(adapter) if modules else adapter, folder / "adapter")
    return base, folder / "adapter"


def log_probabilities(base: Path, adapter: Path | None, merge: bool) -> np.ndarray:
    """Of every position of a prompt, read in one go."""
    model, _ = load(str(base), adapter)
    ids = merged_embedding(model).compress([Segment(PROMPT)]).ids if merge else PROMPT
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def gap(base: Path, adapter: Path, new: Path, merge: bool) -> float:
    """How far the fused model's log-probabilities are from the unfused one's."""
    carried = new if merge else None
    return abs(
        log_probabilities(base, adapter, merge) - log_probabilities(new, carried, merge)
    ).max()


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {n: np.array(a) for n, a in mx.load(str(folder / "model.safetensors")).items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("k", "options"),
    [(2, {}), (3, {"modules": True}), (4, {}), (4, {"head": False}), (4, {"modules": True})],
)
def test_fused_and_unfused_agree_within_1e_3(tmp_path, tied, k, options):
    base, adapter = made(tmp_path, k, tie_word_embeddings=tied, **options)
    done = fuse(str(base), adapter, tmp_path / "new")
    assert gap(base, adapter, tmp_path / "new", merge=True) < 1e-3
    assert gap(base, adapter, tmp_path / "new", merge=False) < 1e-3
    assert max(done.drift.plain.max, done.drift.merged.max) < 1e-3
    assert done.drift.embeddings.worst == 0
    assert done.merge_factor == k
    # A LoRA that did nothing would agree as well.
    alone = log_probabilities(base, None, merge=False)
    assert abs(alone - log_probabilities(tmp_path / "new", None, merge=False)).max() > 0.1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fused_weights_are_the_sums_in_float64(tmp_path, tied):
    base, adapter = made(tmp_path, modules=True, tie_word_embeddings=tied)
    fuse(str(base), adapter, tmp_path / "new")
    before, after, parts = weights(base), weights(tmp_path / "new"), load_adapter(adapter)
    scales = {name: spec.scale for name, spec in parts.tuning.modules.items()}
    lora = {name: np.array(array, np.float64) for name, array in parts.tuning_weights.items()}
    lora |= {f"lm_head.{n}": np.array(a, np.float64) for n, a in parts.head_weights.items()}
    scales["lm_head"] = SCALE
    wanted = dict(before)
    if tied:
        wanted["lm_head.weight"] = before[TABLE]
    for name, scale in scales.items():
        delta = scale * (lora[f"{name}.lora_a"] @ lora[f"{name}.lora_b"]).T
        wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + delta
    assert after.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert np.array_equal(after[TABLE], before[TABLE])


def test_a_tied_models_head_becomes_its_own_and_the_config_says_so(tmp_path):
    base, adapter = made(tmp_path)
    assert fuse(str(base), adapter, tmp_path / "new").untied
    assert (
        json.loads((tmp_path / "new" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    model, _ = load(str(tmp_path / "new"))
    assert output_head(model) is not None
    # Another adapter of that base says by its config that it was made for the tied one.
    merge = load_adapter(tmp_path / "new").merge
    assert merge.base.fields["tie_word_embeddings"] is False


def test_a_tied_model_without_lora_on_its_head_stays_tied(tmp_path):
    base, adapter = made(tmp_path, head=False)
    assert not fuse(str(base), adapter, tmp_path / "new").untied
    assert is_tied(read_config(tmp_path / "new")) is True
    assert "lm_head.weight" not in weights(tmp_path / "new")


def test_a_fused_folder_reloads_bit_for_bit(tmp_path):
    base, adapter = made(tmp_path)
    model, _, config = load(str(base), adapter, return_config=True)
    wanted = dict(tree_flatten(fused(model, config, "base")[0].parameters()))
    fuse(str(base), adapter, tmp_path / "new")
    loaded, _ = load(str(tmp_path / "new"))
    found = dict(tree_flatten(loaded.parameters()))
    assert found.keys() == wanted.keys()
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    before, after = load_adapter(adapter), load_adapter(tmp_path / "new")
    assert all(
        mx.array_equal(after.encoder_weights[name], array)
        for name, array in before.encoder_weights.items()
    )
    # Once more, with nothing left to fuse: the same files.
    fuse(str(tmp_path / "new"), tmp_path / "new", tmp_path / "again")
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "kmerge/merge_encoder.safetensors",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_the_encoder_comes_along_and_the_lora_does_not(tmp_path):
    base, adapter = made(tmp_path)
    fuse(str(base), adapter, tmp_path / "new")
    carried, before = load_adapter(tmp_path / "new" / "kmerge"), load_adapter(adapter)
    assert (carried.tuning_weights, carried.head_weights) == ({}, {})
    assert carried.merge.head_lora is None
    assert carried.merge.encoder == before.merge.encoder
    assert carried.merge.layout == before.merge.layout
    assert carried.merge.provenance["adapter"] == str(adapter)
    assert carried.merge.provenance["base_model"] == str(base)
    assert carried.merge.provenance["fused_by"].startswith("kmerge-mlx ")


def test_an_adapter_for_k_1_becomes_a_plain_model(tmp_path):
    base, adapter = made(tmp_path, 1)
    done = fuse(str(base), adapter, tmp_path / "new")
    assert (done.merge_factor, done.drift.merged, done.drift.embeddings) == (1, None, None)
    assert not (tmp_path / "new" / "kmerge").exists()
    assert gap(base, adapter, tmp_path / "new", merge=False) < 1e-3


def test_whole_layers_take_the_bases_place(tmp_path):
    base = write_base(tmp_path / "base", qwen2_config())
    save_adapter(full_adapter(1, head=True), tmp_path / "adapter")
    fuse(str(base), tmp_path / "adapter", tmp_path / "new")
    assert gap(base, tmp_path / "adapter", tmp_path / "new", merge=True) < 1e-3
    found = weights(tmp_path / "new")
    for name, array in load_adapter(tmp_path / "adapter").tuning_weights.items():
        assert np.array_equal(found[name], np.array(array))


def test_a_bfloat16_base_stays_bfloat16(tmp_path):
    base, adapter = made(tmp_path)
    stored = mx.load(str(base / "model.safetensors"))
    half = {name: array.astype(mx.bfloat16) for name, array in stored.items()}
    mx.save_safetensors(str(base / "model.safetensors"), half)
    fuse(str(base), adapter, tmp_path / "new")
    found = mx.load(str(tmp_path / "new" / "model.safetensors"))
    assert {array.dtype for array in found.values()} == {mx.bfloat16}


def test_weights_that_overflow_are_refused_and_leave_nothing(tmp_path):
    base, adapter = made(tmp_path)
    stored = mx.load(str(base / "model.safetensors"))
    half = {name: array.astype(mx.float16) for name, array in stored.items()}
    mx.save_safetensors(str(base / "model.safetensors"), half)
    large = load_adapter(adapter)
    for name, array in large.tuning_weights.items():
        if "down_proj" in name:
            large.tuning_weights[name] = array * 3e4
    save_adapter(large, adapter)
    with pytest.raises(ModelError, match="log-probabilities that are no numbers"):
        fuse(str(base), adapter, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("gemma2", "no output head of their own"), ("minicpm3", "compute something else")],
)
def test_a_class_whose_head_cannot_be_its_own_is_refused_by_name(model_type, why):
    options = {"head_dim": 32, "scale_depth": 1.4, "dim_model_base": 16, "scale_emb": 1.0}
    options |= {"q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
    options |= {"kv_lora_rank": 16, "rope_scaling": ROPE_OF_MINICPM3, "v_head_dim": 32}
    config = qwen2_config(model_type=model_type, **options)
    model = build(config)
    attach(model, random_adapter(model, 4, keys=("mlp.down_proj",)), PAD)
    with pytest.raises(ModelError, match=why) as error:
        fused(model, config, "this")
    assert f"mlx-lm's {model_type} models" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["base", "adapter", ".", "fresh"])
def test_what_is_read_is_never_replaced(tmp_path, target):
    home = tmp_path / "home"
    base, adapter = made(home)
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    if target == "fresh":
        fuse(str(base), adapter, home / target)
        with pytest.raises(ModelError, match="exists: choose another folder, or give --force"):
            fuse(str(base), adapter, home / target)
        with pytest.raises(ModelError, match=r"--save-path .* would replace .*fresh, which is"):
            fuse(str(home / target), home / target, home / target, force=True)
    else:
        with pytest.raises(ModelError, match="which is read"):
            fuse(str(base), adapter, home / target, force=True)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_force_replaces_a_model_and_nothing_that_holds_more(tmp_path):
    base, adapter = made(tmp_path)
    fuse(str(base), adapter, tmp_path / "new")
    fuse(str(base), adapter, tmp_path / "new", force=True)
    (tmp_path / "new" / "kmerge" / "notes.md").write_text("mine")
    with pytest.raises(AdapterError, match=r"notes\.md"):
        fuse(str(base), adapter, tmp_path / "new", force=True)
    (tmp_path / "new" / "kmerge" / "notes.md").unlink()
    (tmp_path / "new" / "thesis.pdf").write_text("mine")
    with pytest.raises(ModelError, match=r"holds more than model files \(thesis\.pdf\)"):
        fuse(str(base), adapter, tmp_path / "new", force=True)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ModelError, match="is no model folder"):
        fuse(str(base), adapter, other, force=True)


def test_mlx_lm_runs_a_fused_folder_as_it_is(tmp_path):
    base, adapter = made(tmp_path)
    fuse(str(base), adapter, tmp_path / "new")
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tmp_path / "new")]
    command += ["--prompt", "One two three", "-m", "8", "--temp", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(str(base), adapter)
    prompt = [Segment(tokenizer.encode("One two three"), False)]
    wanted = generate(model, tokenizer, prompt, max_tokens=8)
    assert wanted
    assert done.stdout.split("==========")[1].strip() == wanted.strip()


def test_nn_linear_has_no_bias_that_a_table_lacks():
    """What a head's class has beyond the table, it must not get at random."""
    table, x = nn.Embedding(7, 64), mx.random.normal((3, 64))
    for each in (table, table.to_quantized(group_size=32, bits=4)):
        assert mx.abs(_as_linear(each, True)(x) - each.as_linear(x)).max().item() < 1e-5
