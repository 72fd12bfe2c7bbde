"""Adapters to PyTorch checkpoints and back: nothing is lost, what has no equal is refused.

The oracles are PEFT's own matching of names, ``torch.load`` and the safetensors library.
"""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.lora import LoRASwitchLinear
from safetensors import safe_open
from safetensors.numpy import load_file

from kmerge_mlx.adapters.folder import Adapter, save_adapter
from kmerge_mlx.adapters.schema import (
    BaseModelConfig,
    EncoderConfig,
    FullConfig,
    LoRAConfig,
    LoRASpec,
    MergeConfig,
)
from kmerge_mlx.convert import export
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter, lora_to_peft
from kmerge_mlx.errors import CheckpointError
from kmerge_mlx.prompts.lay_out import Layout
from tests import conversions
from tests.checkpoints import make as make_checkpoint
from tests.cli_runner import assert_one_error, change_json, run
from tests.conversions import assert_same_tensors, back, bits, export_refused, exported, specs
from tests.convert.test_peft import converted
from tests.saved_adapters import UP, D, Q, R, make, saved
from tests.tiny import qwen2_config, write_base

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
        "source": "y",
    }


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


def test_a_base_in_a_folder_is_named_from_where_it_was_exported_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    made = make()
    made = replace(made, merge=replace(made.merge, base=BaseModelConfig("base")))
    path = exported(made, tmp_path)
    assert config_of(path)["base_model_name_or_path"] == "../base"
    assert all(str(tmp_path).encode() not in file.read_bytes() for file in path.iterdir())
    monkeypatch.chdir("/")
    assert back(tmp_path).merge.base.id == str(tmp_path / "base")
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


# What is refused or written over, and a ``kmerge.json`` that convert does not believe


tied = conversions.tied


def changed_adapter(kind: str) -> Adapter:
    """An adapter that PyTorch has no equal of."""
    made, table = make(head=kind not in ("full", "without_lora")), "model.embed_tokens"
    merge, encoder, tuning, lora = made.merge, made.encoder_weights, made.tuning, {}
    if kind == "full":
        tuning, lora = FullConfig(1), {f"model.layers.1.{Q}.weight": mx.zeros((D, D))}
    elif kind == "context":
        merge = replace(merge, encoder=EncoderConfig(4, D, 12, 3))
        encoder = {name: mx.zeros(shape) for name, shape in merge.encoder.shapes().items()}
    elif kind == "experts":
        experts = LoRASwitchLinear(D, 6, 5, r=R)
        names = [f"model.layers.{layer}.{UP}" for layer in (0, 1)]
        lora = {f"{n}.{part}": experts[part] for n in names for part in ("lora_a", "lora_b")}
    elif kind == "table":
        tuning = replace(tuning, keys=(*tuning.keys, table))
        lora = {f"{table}.lora_a": mx.zeros((30, R)), f"{table}.lora_b": mx.zeros((R, D))}
    elif kind == "gemma":
        base = BaseModelConfig("google/gemma", {"model_type": "gemma3_text"})
        merge = replace(merge, base=base)
    elif kind == "diverged":
        encoder = encoder | {"w3.bias": mx.full((D,), mx.nan)}
    elif kind == "without_lora":
        tuning = replace(tuning, keys=())
    if kind not in ("full", "without_lora"):
        lora = made.tuning_weights | lora
    return Adapter(merge, tuning, lora, encoder, made.head_weights)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("full", "full fine-tuning is not LoRA: `kmerge-mlx fuse` writes a whole model"),
        ("context", "its encoder also reads the 3 tokens before a block"),
        ("experts", f"{UP} is LoRA on experts"),
        ("table", "model.embed_tokens is LoRA on the embedding table"),
        ("gemma", "its base scales embeddings inside the model"),
        ("diverged", "w3.bias holds NaN or infinite values"),
        ("without_lora", "it has no LoRA: `kmerge-mlx fuse` put it into the model"),
    ],
)
def test_an_adapter_without_an_equal_is_refused_in_one_line(tmp_path, kind, why):
    save_adapter(changed_adapter(kind), tmp_path / "x")
    text = export_refused(tmp_path / "x", tmp_path / "y")
    assert text.startswith(f"{tmp_path}/x cannot be exported: {why}")
    assert "\n" not in text


def test_a_gemma_adapter_without_merging_is_exported_and_converts_back(tmp_path):
    made = changed_adapter("gemma")
    merge = replace(made.merge, encoder=None)
    exported(replace(made, merge=merge, encoder_weights={}), tmp_path)
    assert back(tmp_path).merge.base == merge.base


def test_only_an_export_is_replaced_and_only_by_force(tmp_path):
    path = exported(make(), tmp_path)
    saved(tmp_path / "other", k=2)
    assert "exists: choose another folder, or give `force`" in export_refused(
        tmp_path / "other", path
    )
    export_adapter(tmp_path / "other", path, force=True)
    assert back(tmp_path).merge.merge_factor == 2
    (path / "notes.txt").write_text("precious")
    text = export_refused(tmp_path / "x", path, force=True)
    assert "holds more than exported adapter files (notes.txt)" in text
    for other in (make_checkpoint().write(tmp_path / "checkpoint"), tmp_path / "other"):
        text = export_refused(tmp_path / "x", other, force=True)
        assert "is not a folder of exported adapter files" in text


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = exported(make(k=2), tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    saved(tmp_path / "other", k=4)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "write_state_dict", full)
    with pytest.raises(CheckpointError, match=r"^cannot write .*/y: No space left on device$"):
        export_adapter(tmp_path / "other", path, force=True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "x", "y"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "found {}, expected merge_config.json and scales"),
        ('{"merge_config.json": {}, "scales": [NaN]}', "scales is ['NaN'], expected a list"),
        ({"format_version": 3}, "format_version is 3, expected up to 2"),
        ({"merge_factor": 3}, "the encoder has merge_factor 4, not 3 (says kmerge.json"),
        (
            dict.fromkeys(("hidden_size", "inner_size", "encoder_context")) | {"merge_factor": 1},
            "found an encoder for K = 4, the adapter was made for none (says kmerge.json",
        ),
        ({"base_model": {"id": "a\x1b[2J"}}, "base_model.id is 'a\\x1b[2J', expected a printable"),
    ],
)
def test_a_torn_or_wrong_companion_is_refused_by_name_and_may_be_removed(tmp_path, content, said):
    path = exported(make(), tmp_path)
    file = path / "kmerge.json"
    if isinstance(content, dict):
        data = json.loads(file.read_text())
        merge = data["merge_config.json"] | content
        content = json.dumps(data | {"merge_config.json": merge})
    file.write_text(content)
    text = conversions.refused(tmp_path, path)
    assert said in text
    assert "kmerge.json" in text
    file.unlink()
    back(tmp_path)


def test_another_base_than_the_companions_is_refused_by_name(tmp_path, tied):
    convert_checkpoint(str(make_checkpoint().write(tmp_path / "src")), tmp_path / "x", str(tied))
    export_adapter(tmp_path / "x", tmp_path / "y")
    other = str(write_base(tmp_path / "other", qwen2_config(rope_theta=77.0)))
    text = conversions.refused(tmp_path, tmp_path / "y", model=other)
    assert "rope_theta is 77.0, the adapter was made for 10000.0 (says kmerge.json" in text
    (tmp_path / "y" / "kmerge.json").unlink()
    back(tmp_path, model=other)


def test_lora_that_was_trained_on_elsewhere_converts_and_keeps_what_the_companion_says(tmp_path):
    """Other ranks, an alpha and modules, as PyTorch may have made of an export."""
    made = make(head=False)
    layout = Layout(threshold=9)
    exported(replace(made, merge=replace(made.merge, layout=layout)), tmp_path)
    trained = make_checkpoint(d=D, rank=3, lora_alpha=5, vocab_size=30).write(tmp_path / "z")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (trained / name).replace(tmp_path / "y" / name)
    found = back(tmp_path)
    assert (found.merge.layout, found.merge.pad_token_id) == (layout, 7)
    assert found.tuning.uniform == LoRASpec(3, 5 / 3)


def test_the_companions_padding_outlives_the_bases_default(tmp_path, tied):
    """A base's tokenizer says what padding would be; this says what the encoder was trained on."""
    convert_checkpoint(str(make_checkpoint().write(tmp_path / "src")), tmp_path / "x", str(tied))
    change_json(tmp_path / "x" / "merge_config.json", pad_token_id=5)
    export_adapter(tmp_path / "x", tmp_path / "y")
    assert back(tmp_path, model=str(tied)).merge.pad_token_id == 5


def test_export_prints_one_line_and_convert_takes_it_back(adapter_path, base_path, tmp_path):
    result = run("export", adapter_path, tmp_path / "y")
    assert (result.code, result.out) == (0, "")
    assert result.err == f"{tmp_path}/y: K = 4, D = 64, 50 tensors, 0.9 MB, base {base_path}\n"
    assert run("convert", tmp_path / "y", tmp_path / "x", "--k", 4).code == 0
    found = json.loads(run("info", tmp_path / "y", "--json").out)
    assert found["kind"] == "checkpoint"
    assert found["adapters"][0]["pad_token_id"] == 223


def test_export_of_several_k_asks_which_and_says_what_the_paper_does_not_have(tmp_path):
    for k in (2, 3):
        made = make(k)
        made = replace(made, merge=replace(made.merge, layout=Layout()))
        save_adapter(made, tmp_path / "all" / f"k{k}")
    args = ("export", tmp_path / "all", tmp_path / "y")
    assert_one_error(run(*args), 1, "holds adapters for K = 2, 3: choose one with --k")
    assert "note: the paper's code merges the whole prompt" in run(*args, "--k", 3).err


@pytest.mark.parametrize("k", [1, 4])
def test_the_bundled_adapters_go_out_and_come_back(tmp_path, k):
    result = run("export", "bundled", tmp_path / "y", "--k", k)
    assert result.code == 0
    assert ("note: K = 1 merges nothing: there is no encoder.pth" in result.err) == (k == 1)
    assert run("convert", tmp_path / "y", tmp_path / "x").code == 0
    answers = [
        run("generate", "-p", "AB", "--adapter-path", adapter, "--k", k, "-m", 3)
        for adapter in ("bundled", tmp_path / "x")
    ]
    assert answers[0].out == answers[1].out
    assert json.loads(run("info", tmp_path / "y", "--json").out)["adapters"][0]["merge_factor"] == k


def test_an_export_without_merging_is_no_adapter_for_another_k(tmp_path):
    made = make()
    merge = MergeConfig(None, head_lora=made.merge.head_lora)
    path = exported(replace(made, merge=merge, encoder_weights={}), tmp_path)
    result = run("convert", path, tmp_path / "back", "--k", 4)
    assert_one_error(result, 1, "kmerge.json says K = 1, but --k is 4")
    result = run("generate", "-p", "A", "--adapter-path", path)
    assert_one_error(result, 1, "run `kmerge-mlx convert")
