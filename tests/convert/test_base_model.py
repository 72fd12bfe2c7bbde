"""A checkpoint beside its base: modules, sizes, and the base's tensors that PEFT saved as well."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kmerge_mlx import load
from kmerge_mlx.convert.peft import copies_of_base
from tests import conversions
from tests.checkpoints import PREFIX, Checkpoint, make
from tests.cli_runner import run
from tests.conversions import convert, refused
from tests.tiny import EXPERTS, qwen2_config, write_base

EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"
BELOW = f"{PREFIX}lm_head.base_layer.weight"

tied = conversions.tied


def test_a_base_of_other_sizes_is_refused_with_every_shape(tmp_path, tied):
    other = write_base(tmp_path / "o", qwen2_config(intermediate_size=96, num_key_value_heads=1))
    (other / "model.safetensors").unlink()  # only the config is needed, as no weights are repeated
    made = make(head=False)
    lines = refused(tmp_path, made, model=str(other)).splitlines()
    down, v = "mlp.down_proj", "self_attn.v_proj"
    assert [line.strip(" -") for line in lines[1:]] == [
        f"`model` {other} has {down} (64, 96), its LoRA is for (64, 128) (model.layers.0.{down} "
        "and 1 more)",
        f"`model` {other} has {v} (32, 64), its LoRA is for (64, 64) (model.layers.0.{v} and 1 "
        "more)",
    ]
    assert load(str(tied), convert(tmp_path, made, model=str(tied)))


def test_modules_that_the_base_does_not_have_are_refused_by_name(tmp_path, tied):
    made = make(layers=3)
    for part in "AB":
        array = made.adapter.pop(f"{PREFIX}model.layers.1.mlp.down_proj.lora_{part}.weight")
        made.adapter[f"{PREFIX}model.layers.1.mlp.dense.lora_{part}.weight"] = array
    made.config["target_modules"].append("dense")
    text = refused(tmp_path, made, model=str(tied))
    for part in (
        "has no module mlp.dense (model.layers.1.mlp.dense)",
        "has no module self_attn.q_proj (model.layers.2.self_attn.q_proj)",
        "has 2 layers, the LoRA covers 3",
    ):
        assert part in text


def test_a_module_that_is_a_target_in_every_layer_is_not_missing_in_one(tmp_path, tied):
    """Where the options choose layers, or the base's layers differ, it may be."""
    made = make()
    for part in "AB":
        del made.adapter[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_{part}.weight"]
    text = refused(tmp_path, made, model=str(tied))
    assert "self_attn.q_proj has no LoRA in some layers, though target_modules names it" in text
    assert text.endswith("(model.layers.1.self_attn.q_proj)")
    chosen = ["0.self_attn.q_proj", "v_proj", "down_proj", "lm_head"]
    for options in (
        {"target_modules": chosen},
        {"target_modules": rf".*\.({'|'.join(chosen)})|lm_head"},
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
    ):
        shutil.rmtree(tmp_path / "src")
        made.config |= make().config | options
        assert load(str(tied), convert(tmp_path, made, model=str(tied)))
        shutil.rmtree(tmp_path / "dst")
    # The first layer is a mixture of experts: it has no mlp.down_proj.
    config = qwen2_config(**EXPERTS | {"mlp_only_layers": [1]}, tie_word_embeddings=False)
    made = make(head=False)
    for part in "AB":
        del made.adapter[f"{PREFIX}model.layers.0.mlp.down_proj.lora_{part}.weight"]
    base = write_base(tmp_path / "base", config)
    shutil.rmtree(tmp_path / "src")
    assert convert(tmp_path, made, model=str(base))


def test_a_quantized_base_is_compared_by_what_it_stands_for(tmp_path):
    packed = qwen2_config(quantization={"group_size": 32, "bits": 4})
    base = write_base(tmp_path / "base", packed)
    assert load(str(base), convert(tmp_path, make(), model=str(base)))


# Copies of the base's embedding and head


@pytest.fixture
def table(tied) -> np.ndarray:
    return load_file(tied / "model.safetensors")["model.embed_tokens.weight"]


def files(tmp_path, made: Checkpoint, **options: object) -> list[bytes]:
    path = convert(tmp_path, made, **options)
    found = [(path / f"{n}.safetensors").read_bytes() for n in ("adapters", "merge_encoder")]
    shutil.rmtree(path)
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_copies_that_peft_saves_are_found(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **heads))
    base.name_or_path = ""  # PEFT would ask the hub for it
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    peft.get_peft_model(base, lora).save_pretrained(tmp_path, save_embedding_layers=True)
    found = copies_of_base(load_file(tmp_path / "adapter_model.safetensors"))
    assert found == {EMBEDDING: "model.embed_tokens.weight", HEAD: "lm_head.weight"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod."])
def test_copies_of_the_base_are_left_out_with_a_note(tmp_path, tied, table, dtype, wrapper):
    made, notes = make(), []
    plain = files(tmp_path, made, model=str(tied), note=notes.append)
    assert notes == [f"left out, as copies of the base's tensors: {BELOW}"]
    names = [name.replace("model.model.", f"model.{wrapper}model.") for name in (EMBEDDING, HEAD)]
    made.adapter |= dict.fromkeys(names, table.astype(dtype))
    assert files(tmp_path, made, model=str(tied), note=notes.append) == plain
    left_out = ", ".join(sorted([BELOW, *names]))
    assert notes[1:] == [f"left out, as copies of the base's tensors: {left_out}"]


def test_the_command_says_what_it_left_out(tmp_path, base_path, checkpoint_path, adapter_path):
    """A checkpoint of the authors' own code, with what PEFT adds where it cannot see the base."""
    shutil.copytree(checkpoint_path, tmp_path / "src")
    file = tmp_path / "src" / "adapter_model.safetensors"
    table = load_file(base_path / "model.safetensors")["model.embed_tokens.weight"]
    save_file(load_file(file) | {EMBEDDING: table, HEAD: table}, file)
    result = run("convert", tmp_path / "src", tmp_path / "dst", "--model", base_path)
    assert (result.code, result.out) == (0, "")
    left_out = f"{BELOW}, {HEAD}, {EMBEDDING}"
    assert f"note: left out, as copies of the base's tensors: {left_out}\n" in result.err
    for name in ("adapters.safetensors", "merge_encoder.safetensors"):
        assert (tmp_path / "dst" / name).read_bytes() == (adapter_path / name).read_bytes()
    refused = run("convert", tmp_path / "src", tmp_path / "other")
    assert (refused.code, refused.err.count("give --model if it is a copy of the base's")) == (1, 2)


def test_copies_that_cannot_be_compared_are_refused(tmp_path, tied, table):
    made = make()
    made.adapter[EMBEDDING] = table
    text = refused(tmp_path, made)
    assert f"tensor {EMBEDDING} (700, 64) is not part of a LoRA: give `model` if it is" in text
    packed = qwen2_config(quantization={"group_size": 32, "bits": 4})
    text = refused(tmp_path, made, model=str(write_base(tmp_path / "packed", packed)))
    assert "is quantized there: give the model that it was made from" in text


def test_what_is_not_a_copy_is_refused_by_name(tmp_path, tied, table):
    changed = table.copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], 9)
    for name, array, complaint in (
        (EMBEDDING, changed, "is not a copy of the base's: it was trained, or is of another base"),
        (HEAD, changed, "is not a copy of the base's: it was trained"),
        (BELOW, changed, "is not a copy of the base's: it was trained"),
        (f"module.{BELOW}", changed, "is not a copy of the base's: it was trained"),
        (f"{PREFIX}model.layers.0.mlp.down_proj.base_layer.weight", table, "has (64, 128)"),
        (EMBEDDING, table[:-1], "has (700, 64); retrain without resizing the vocabulary"),
        (f"{PREFIX}score.weight", table, "has none of its name"),
        (f"{PREFIX}model.layers.0.input_layernorm.weight", table[0], "it was trained"),
    ):
        made = make()
        made.adapter[name] = np.ascontiguousarray(array)
        text = refused(tmp_path, made, model=str(tied))
        assert f"tensor {name} {array.shape}" in text
        assert complaint in text


def test_a_head_of_its_own_is_compared_with_itself(tmp_path):
    config = qwen2_config(tie_word_embeddings=False)
    base = write_base(tmp_path / "base", config)
    weights, made = load_file(base / "model.safetensors"), make(head=False)
    made.adapter |= {HEAD: weights["lm_head.weight"]}
    assert convert(tmp_path, made, model=str(base))
    made.adapter |= {HEAD: weights["model.embed_tokens.weight"]}
    shutil.rmtree(tmp_path / "dst")
    assert "it was trained" in refused(tmp_path, made, model=str(base))
