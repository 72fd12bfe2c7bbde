"""Adapters to PyTorch checkpoints and back: nothing is lost, and PEFT's rules say what ours do.

The oracles are PEFT's own matching of names, ``torch.load`` and the safetensors library.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from kmerge_mlx.adapters.folder import Adapter
from kmerge_mlx.adapters.schema import BaseModelConfig, LoRAConfig, LoRASpec, MergeConfig
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter, lora_to_peft
from tests.checkpoints import make as make_checkpoint
from tests.conversions import assert_same_tensors, back, bits, exported, specs
from tests.convert.test_peft import converted
from tests.saved_adapters import UP, D, Q, R, make

FILES = {"adapter_config.json", "adapter_model.safetensors", "encoder.pth", "kmerge.json"}


def config_of(path) -> dict:
    return json.loads((path / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("k", "dtype", "head", "by_module"),
    [(2, mx.float32, True, True), (3, mx.float16, False, False), (4, mx.bfloat16, True, False)],
)
def test_an_exported_adapter_converts_back_to_itself(tmp_path, k, dtype, head, by_module):
    made = make(k, head, by_module, dtype)
    exported(made, tmp_path)
    found = back(tmp_path)
    assert_same_tensors(found, made)
    assert specs(found) == specs(made)
    assert found.tuning.dropout == made.tuning.dropout
    assert replace(found.merge, provenance={}) == replace(made.merge, provenance={})
    assert found.merge.provenance == {
        "metrics": made.merge.provenance["metrics"],
        "converter": found.merge.provenance["converter"],
        "source": str(tmp_path / "y"),
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_the_uniform_form_stays_uniform(tmp_path, layers):
    """Of the last layers alone too, where the base says how many there are."""
    made = make()
    base = BaseModelConfig("some/base", {"num_hidden_layers": 2, "hidden_size": D})
    weights = {n: a for n, a in made.tuning_weights.items() if layers == 2 or ".layers.1." in n}
    tuning = replace(made.tuning, num_layers=layers)
    merge = replace(made.merge, base=base)
    targets = config_of(
        exported(replace(made, merge=merge, tuning=tuning, tuning_weights=weights), tmp_path)
    )["target_modules"]
    prefix = "model.layers.1." if layers == 1 else ""
    assert targets == ["lm_head", f"{prefix}{UP}", f"{prefix}{Q}"]
    assert back(tmp_path).tuning == replace(tuning, keys=(UP, Q))


def test_what_is_not_known_of_an_adapter_stays_unknown(tmp_path):
    made = make()
    made = replace(made, merge=MergeConfig(made.merge.encoder, head_lora=made.merge.head_lora))
    assert config_of(exported(made, tmp_path))["base_model_name_or_path"] is None
    assert replace(back(tmp_path).merge, provenance={}) == made.merge


def test_the_lora_of_a_head_of_its_own_comes_back_to_the_file_it_was_in(tmp_path):
    made = make()
    base = BaseModelConfig("some/base", {"tie_word_embeddings": False})
    head = {f"lm_head.{part}": array for part, array in made.head_weights.items()}
    made = replace(
        made,
        merge=replace(made.merge, base=base, head_lora=None),
        tuning=replace(made.tuning, keys=(*made.tuning.keys, "lm_head")),
        tuning_weights=made.tuning_weights | head,
        head_weights={},
    )
    assert "lm_head" in config_of(exported(made, tmp_path))["target_modules"]
    assert_same_tensors(back(tmp_path), made)


def test_without_merging_there_is_no_encoder_and_it_comes_back(tmp_path):
    made = make()
    made = replace(made, merge=replace(made.merge, encoder=None), encoder_weights={})
    path = exported(made, tmp_path)
    assert {file.name for file in path.iterdir()} == FILES - {"encoder.pth"} | {"metrics.json"}
    found = back(tmp_path)
    assert_same_tensors(found, made)
    assert found.merge.encoder is None


@pytest.mark.parametrize("losses", [1, 9000])
def test_metrics_are_a_file_again_and_kept_even_where_that_is_too_large(tmp_path, losses):
    made = make()
    metrics = {"losses": [0.125] * losses, "note": "é"}
    provenance = {"source": "first", "metrics": metrics, "eval_accuracy": "left out: 70000 bytes"}
    made = replace(made, merge=replace(made.merge, provenance=provenance))
    path = exported(made, tmp_path)
    assert {file.name for file in path.iterdir()} == {*FILES, "metrics.json"}
    assert json.loads((path / "metrics.json").read_text()) == metrics
    found = back(tmp_path).merge.provenance
    assert found == provenance | {"converter": found["converter"]}


@pytest.mark.parametrize(("k", "dtype", "bin_file"), [(3, "float16", False), (4, "float32", True)])
def test_a_converted_checkpoint_exports_to_its_own_tensors(tmp_path, k, dtype, bin_file):
    torch = pytest.importorskip("torch")
    made = make_checkpoint(k=k, dtype=dtype, use_rslora=True, lora_alpha=7)
    convert_checkpoint(str(made.write(tmp_path / "y", bin_file)), tmp_path / "x")
    export_adapter(tmp_path / "x", tmp_path / "z")
    state = torch.load(tmp_path / "z" / "encoder.pth", weights_only=True)
    tensors = load_file(tmp_path / "z" / "adapter_model.safetensors")
    lora = {n: a for n, a in made.adapter.items() if "base_layer" not in n}
    state = {name: tensor.numpy() for name, tensor in state.items()}
    for found, expected in ((state, made.encoder), (tensors, lora)):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes())
    assert json.loads((tmp_path / "z" / "metrics.json").read_text()) == made.metrics
    with safe_open(tmp_path / "z" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_plain_adapter_has_a_plain_config(tmp_path):
    assert config_of(exported(make(), tmp_path)) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "inference_mode": True,
        "r": R,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "use_rslora": False,
        "bias": "none",
        "target_modules": ["lm_head", UP, Q],
        "rank_pattern": {},
        "alpha_pattern": {"lm_head": 7},
        "modules_to_save": None,
    }


def test_a_base_in_a_folder_is_named_so_that_it_can_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    made = make()
    made = replace(made, merge=replace(made.merge, base=BaseModelConfig("base")))
    path = exported(made, tmp_path)
    assert config_of(path)["base_model_name_or_path"] == str(tmp_path / "base")
    assert back(tmp_path).merge.base.id == "base"
    export_adapter(tmp_path / "x", tmp_path / "again")
    for file in path.iterdir():  # the same adapter gives the same bytes
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


PATHS = [
    f"{stack}.{layer}.{inside}"
    for stack in ("model.layers", "model.more")
    for layer in (0, 1, 10, 11)
    for inside in ("self_attn.q_proj", "self_attn.k_proj", "q_proj", "mlp.0.up_proj", "mlp.10.up")
] + ["lm_head", "proj.lm_head", "model.norm-1"]
SPECS = st.builds(
    LoRASpec,
    st.integers(1, 70),
    st.one_of(
        st.floats(-1e6, 1e6),
        st.integers(0, 2**45),
        st.floats(0.1, 50).map(lambda alpha: alpha / math.sqrt(6)),
        st.sampled_from([1.0, 2.0, 0.1, 1e-310, 5e-324, 1e250]),
    ),
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(PATHS), SPECS, min_size=1, max_size=20), st.data())
def test_peft_gives_every_module_its_rank_and_scale_and_no_other_module_any(modules, data):
    """Equal to the last bit when it is read back; for PEFT alone, next to it at most."""
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    if data.draw(st.booleans(), label="one spec for all"):
        modules = dict.fromkeys(modules, next(iter(modules.values())))
    weights = {}
    for name, spec in modules.items():
        weights[f"{name}.lora_a"] = mx.zeros((3, spec.rank))
        weights[f"{name}.lora_b"] = mx.zeros((spec.rank, 3))
    adapter = Adapter(MergeConfig(None), LoRAConfig(12, modules=modules), weights, {})
    made, tensors, exact_scales = lora_to_peft(adapter, None)
    config = LoraConfig(**json.loads(json.dumps(made)))
    for name in PATHS:
        hit = bool(tuners.check_target_module_exists(config, name))
        assert hit == (name in modules) or name == "proj.lm_head"
        if name in modules:
            ranks, alphas = config.rank_pattern, config.alpha_pattern
            rank = ranks.get(get_pattern_key(ranks, name), config.r)
            scale = alphas.get(get_pattern_key(alphas, name), config.lora_alpha) / rank
            assert rank == modules[name].rank
            exact = float(modules[name].scale)
            assert math.nextafter(exact, -math.inf) <= scale <= math.nextafter(exact, math.inf)
    found = converted(
        json.loads(json.dumps(made)), tensors, head_is_a_layer=True, scales=exact_scales
    )
    read = found.tuning.modules or {
        n.rsplit(".", 1)[0]: found.tuning.uniform for n in found.tuning_weights
    }
    assert read == modules
    assert bits(found.tuning_weights) == bits(weights)
