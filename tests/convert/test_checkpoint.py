"""What is in a checkpoint folder to what is in an adapter folder: read, checked, written.

Checkpoints are made by hand (``tests.checkpoints``), so the expected bits are numpy's; that the
hand-made files are what torch writes, torch says. What loads the result beside us is mlx-lm.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from kmerge_mlx import load
from kmerge_mlx.adapters.folder import FILES, load_adapter
from kmerge_mlx.adapters.schema import BaseModelConfig, EncoderConfig
from kmerge_mlx.convert.checkpoint import convert_checkpoint, find_checkpoint
from kmerge_mlx.errors import AdapterError, ModelError
from tests import conversions
from tests.checkpoints import PREFIX, Checkpoint, make, torch_file
from tests.conversions import convert, refused
from tests.tiny import PAD, build, qwen2_config, write_base

NAMES = {"net.0": "encoder.w1", "net.2": "encoder.w2", "net.4": "encoder.w3"}

tied = conversions.tied


def stored(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of an adapter folder, read by the safetensors library."""
    return load_file(path / "adapters.safetensors") | load_file(path / "merge_encoder.safetensors")


def expected(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The tensors that a checkpoint's adapter folder should hold, by the table of DESIGN 3."""
    tensors = {}
    for name, array in checkpoint.encoder.items():
        layer, part = name.rsplit(".", 1)
        tensors[f"{NAMES[layer]}.{part}"] = array
    for name, array in checkpoint.adapter.items():
        if ".base_layer." not in name:
            ours = name.removeprefix(PREFIX).removesuffix(".weight")
            tensors[ours.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = array.T
    return tensors


def test_the_hand_made_encoder_file_is_what_torch_reads():
    torch = pytest.importorskip("torch")
    made = make(k=2, d=8, dtype="float16").encoder
    found = torch.load(io.BytesIO(torch_file(made)), weights_only=True)
    assert list(found) == list(made)
    assert all(found[name].numpy().tobytes() == made[name].tobytes() for name in made)


@pytest.mark.parametrize("bin_file", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_tensor_is_there_bit_for_bit(tmp_path, tied, dtype, bin_file):
    made = make(dtype=dtype)
    made.adapter[f"{PREFIX}lm_head.lora_A.weight"][0, :2] = [-0.0, np.finfo(dtype).tiny / 2]
    found = stored(convert(tmp_path, made, bin_file, model=str(tied)))
    wanted = expected(made)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize(("k", "h"), [(2, None), (5, 200)])
def test_k_d_and_h_are_read_from_the_shapes_and_the_rest_is_left_open(tmp_path, k, h):
    merge = load_adapter(convert(tmp_path, make(k=k, d=16, h=h))).merge
    assert merge.encoder == EncoderConfig(k, 16, h or 2 * k * 16)
    # The base as the PEFT config names it; what only itself can tell is not known.
    assert (merge.base, merge.pad_token_id) == (BaseModelConfig("Qwen/Qwen2.5-0.5B"), None)


def test_the_configs_say_what_was_known(tmp_path, tied):
    made = make()
    made.metrics = {"accuracy": [0.25, 0.5], "best": None}
    path = convert(tmp_path, made, model=str(tied), k=4)
    merge = json.loads((path / "merge_config.json").read_text())
    name = os.path.relpath(tied, path)
    assert merge["base_model"]["id"] == name
    assert load_adapter(path).merge.base.id == str(tied)
    assert merge["base_model"]["config"]["vocab_size"] == 700
    assert merge["pad_token_id"] == PAD
    assert merge["layout"] == {"merges": "all", "threshold": 32, "chat_template": False}
    assert merge["provenance"]["metrics"] == made.metrics
    assert merge["provenance"]["source"] == "src"
    assert merge["provenance"]["peft_version"] == "0.21.2"
    assert json.loads((path / "adapter_config.json").read_text())["model"] == name
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", ["metrics", "eval_accuracy"])
@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"loss": NaN, "best": -Infinity}', {"loss": "NaN", "best": "-Infinity"}),
        ("{", "left out: .* is not valid JSON .*"),
        (json.dumps(["x" * 100] * 30_000), "left out: 3120000 bytes"),
    ],
    ids=["nan", "torn", "endless"],
)
def test_metrics_are_kept_for_people_and_never_in_the_way(tmp_path, name, content, kept):
    source = make().write(tmp_path / "src")
    (source / "metrics.json").unlink()
    (source / f"{name}.json").write_text(content)
    convert_checkpoint(str(source), tmp_path / "dst")
    text = (tmp_path / "dst" / "merge_config.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)["provenance"][name]
    assert found == kept or re.fullmatch(kept, found)


def rounded(array: np.ndarray, dtype: str) -> bytes:
    """To the nearest number of the dtype, ties to even; by numpy, or by hand where it has none."""
    if dtype != "bfloat16":
        return array.astype(dtype).tobytes()
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_rounds_every_tensor_to_the_nearest(tmp_path, dtype):
    made = make()
    adapter = load_adapter(convert(tmp_path, made, dtype=dtype))
    found = {f"encoder.{name}": array for name, array in adapter.encoder_weights.items()}
    found |= {f"lm_head.{name}": array for name, array in adapter.head_weights.items()}
    found |= adapter.tuning_weights
    assert found.keys() == expected(made).keys()
    for name, array in expected(made).items():
        assert str(found[name].dtype) == f"mlx.core.{dtype}"
        assert np.array(found[name].view(mx.uint16)).tobytes() == rounded(array, dtype)


def test_weights_that_the_dtype_cannot_hold_are_refused_by_name(tmp_path):
    made = make()
    made.encoder["net.2.weight"][3, 3] = 1e6
    text = refused(tmp_path, made, dtype="float16")
    assert text == "`dtype` float16 cannot hold w2.weight: give float32 or bfloat16"
    assert convert(tmp_path, made, dtype="bfloat16").is_dir()


def test_the_prefix_of_distributed_training_is_dropped(tmp_path):
    made = make()
    wanted = expected(made)
    made.encoder = {f"module.{name}": array for name, array in made.encoder.items()}
    found = stored(convert(tmp_path, made))
    assert all(found[name].tobytes() == array.tobytes() for name, array in wanted.items())
    made.encoder["net.0.bias"] = made.encoder["module.net.0.bias"]
    shutil.rmtree(tmp_path / "dst")
    assert "there with and without a wrapper's prefix" in refused(tmp_path, made)


@pytest.mark.parametrize("bin_file", [False, True])
def test_what_zero_3_leaves_is_one_line_a_file_that_says_how_to_save(tmp_path, bin_file):
    made = make()
    for tensors in (made.encoder, made.adapter):
        tensors |= {name: np.empty(0, "f4") for name in list(tensors)[:4]}
    source = made.write(tmp_path / "src", bin_file)
    lines = refused(tmp_path, source).splitlines()
    names = (
        "encoder.pth: 4 of 6",
        f"adapter_model.{'bin' if bin_file else 'safetensors'}: 4 of 15",
    )
    for name, line in zip(names, lines[1:], strict=True):
        assert f"{source}/{name} tensors are empty, " in line
        assert "ZeRO-3" in line
        assert "stage3_gather_16bit_weights_on_model_save" in line


def test_an_encoder_that_does_not_fit_itself_is_refused(tmp_path):
    for name, array, complaint in (
        ("net.2.bias", None, "net.2.bias is missing, expected shape (256,)"),
        ("extra", np.ones(3, "f4"), "extra (3,) belongs to nothing here"),
        ("net.0.bias", np.ones(5, "f4"), "net.0.bias has shape (5,), expected (512,)"),
        ("net.0.weight", None, "not a merge encoder: found"),
        ("net.4.weight", np.ones((65, 256), "f4"), "net.4.weight (65, 256) give no whole merge"),
        ("net.0.weight", np.ones((0, 256), "f4"), "inner_size is 0"),
    ):
        made = make()
        made.encoder.pop(name, None)
        if array is not None:
            made.encoder[name] = array
        assert complaint in refused(tmp_path, made)
    text = refused(tmp_path, make(k=3), k=4)
    assert "merges K = 3 tokens, but `k` is 4: give 3 or leave it out" in text


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_diverged_run_is_refused_by_tensor(tmp_path, value):
    made = make()
    made.encoder["net.2.weight"][-1, -1] = value
    made.adapter[f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"][0, 0] = value
    made.adapter[f"{PREFIX}lm_head.lora_A.weight"][0, 0] = value
    lines = refused(tmp_path, made).splitlines()
    assert [line.split()[1] for line in lines[1:]] == [
        *("w2.weight", "model.layers.1.mlp.down_proj.lora_b", "lm_head.lora_a")
    ]
    assert all("holds NaN or infinite values: the training run diverged" in x for x in lines[1:])


def test_everything_wrong_with_one_checkpoint_is_listed_at_once(tmp_path):
    made = make(k=3)
    made.encoder["net.0.bias"] = np.full(5, np.nan, "f4")
    made.config["use_dora"] = True
    source = made.write(tmp_path / "src")
    lines = refused(tmp_path, source, k=4).splitlines()
    assert lines[0] == f"{source} cannot be converted: 4 problems"
    for part in ("`k` is 4", "net.0.bias has shape", "use_dora", "w1.bias holds"):
        assert sum(part in line for line in lines[1:]) == 1


def test_the_best_or_last_sub_folder_is_found_where_the_folder_is_no_checkpoint(tmp_path):
    for i, (folders, found) in enumerate(
        (
            (("best",), "best"),
            (("last", "best", "step_best", "step_last"), "best"),
            (("last", "step_best", "step_last"), "step_best"),
            (("step_last", "last"), "last"),
            (("step_last", "other"), "step_last"),
            (("small_stage",), "small_stage"),
            (("", "best"), ""),
        )
    ):
        root = tmp_path / str(i)
        for name in folders:
            make().write(root / name)
        (root / "logs").mkdir()
        assert find_checkpoint(str(root)) == root / found
    for name in ("stage_b", "stage_a"):
        make().write(tmp_path / "several" / name)
    text = refused(tmp_path, tmp_path / "several")
    assert text.endswith("holds several checkpoints (stage_a, stage_b): name one of them")


def test_what_is_no_checkpoint_is_one_line(tmp_path, tied):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    (tmp_path / "empty").mkdir()
    for name in ("encoder.pth", "adapter_config.json", "adapter_model.safetensors"):
        (make().write(tmp_path / name) / name).unlink()
    adapter = convert(tmp_path, make())
    for source, why in (
        *((tmp_path / name, name) for name in ("encoder.pth", "adapter_config.json")),
        (tmp_path / "adapter_model.safetensors", "neither adapter_model.safetensors nor"),
        (tmp_path / "empty", "holds no encoder.pth and no adapter_config.json"),
        (tied, "holds no encoder.pth and no adapter_config.json"),
        (tied / "config.json", "is a file: give the folder that holds encoder.pth"),
        (adapter, "is an adapter folder already"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("nobody/nothing", "nobody/nothing"),
        ("", ""),
    ):
        text = refused(tmp_path, source, force=True)
        assert why in text
        assert "\n" not in text


def test_an_adapter_is_replaced_only_by_force_and_by_a_whole_one(tmp_path):
    path = convert(tmp_path, make())
    before = {name: (path / name).read_bytes() for name in FILES}
    made = make(k=2)
    source = made.write(tmp_path / "other")
    text = refused(tmp_path, source, AdapterError)
    assert "exists: choose another folder, or give `force`" in text
    made.encoder["net.0.bias"][0] = np.nan
    assert "diverged" in refused(tmp_path, made.write(tmp_path / "broken"), force=True)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    convert_checkpoint(str(source), path, force=True)
    assert load_adapter(path).merge.encoder.merge_factor == 2


# The base of a checkpoint, if it is known: where the head's LoRA goes, and what does not fit


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    config = qwen2_config(tie_word_embeddings=False)
    return write_base(tmp_path_factory.mktemp("untied"), config)


@pytest.mark.parametrize("base", ["tied", "untied", None])
def test_the_head_lies_with_the_other_lora_only_where_the_base_is_known_untied(
    tmp_path, request, base
):
    model = request.getfixturevalue(base) if base else None
    made = make()
    if base == "untied":
        del made.adapter[f"{PREFIX}lm_head.base_layer.weight"]  # it is of the tied one
    path = convert(tmp_path, made, model=base and str(model))
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
    if head != "tied":
        del made.adapter[f"{PREFIX}lm_head.base_layer.weight"]  # it is of the tied one
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
        assert mx.allclose(ours(ids), theirs(ids), atol=1e-3)
        assert not mx.allclose(ours(ids), plain(ids), atol=1)


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
