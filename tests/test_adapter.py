"""The adapter folder: strict on the way in, whole on the way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.lora import LoRASwitchLinear
from safetensors.numpy import load_file

from kmerge_mlx.adapter import (
    FILES,
    Adapter,
    check_destination,
    find_adapters,
    load_adapter,
    save_adapter,
)
from kmerge_mlx.config import (
    FORMAT_VERSION,
    BaseModelConfig,
    EncoderConfig,
    LoRAConfig,
    LoRASpec,
    MergeConfig,
)
from kmerge_mlx.errors import AdapterError

D, R, V = 8, 2, 30
Q, UP = "self_attn.q_proj", "mlp.up_proj"


def make(k: int = 4, head: bool = True, by_module: bool = False, dtype=mx.float32) -> Adapter:
    mx.random.seed(k)
    sizes, spec = EncoderConfig(k, D, 12), LoRASpec(R, 8.0)
    names = [f"model.layers.{i}.{key}" for i in (0, 1) for key in (Q, UP)]
    weights = {}
    for name in names:
        weights[f"{name}.lora_a"] = mx.random.normal((D, R)).astype(dtype)
        weights[f"{name}.lora_b"] = mx.random.normal((R, 6)).astype(dtype)
    encoder = {n: mx.random.normal(s).astype(dtype) for n, s in sizes.shapes().items()}
    head_weights = {
        "lora_a": mx.random.normal((D, R)).astype(dtype),
        "lora_b": mx.random.normal((R, V)).astype(dtype),
    }
    merge = MergeConfig(
        sizes,
        BaseModelConfig("some/base", {"hidden_size": D, "vocab_size": V}),
        pad_token_id=7,
        head_lora=LoRASpec(R, 3.5) if head else None,
        layout={"merged": "prompt"},
        provenance={"metrics": {"accuracy": [0.5, None]}},
    )
    lora = (
        LoRAConfig(2, 0.05, modules=dict.fromkeys(names, spec))
        if by_module
        else LoRAConfig(2, 0.05, spec, (Q, UP))
    )
    return Adapter(merge, lora, weights, encoder, head_weights if head else {})


def saved(path: Path, **options) -> Path:
    save_adapter(make(**options), path)
    return path


def refused(path: Path, k: int | None = None) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, k)
    text = str(caught.value)
    assert text.splitlines()[0].isprintable()
    return text


def change(path: Path, name: str, **values) -> None:
    """Sets entries of a JSON file of an adapter."""
    content = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(content | values))


# ---- save, then load ----


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("by_module", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, head, by_module, dtype):
    adapter = make(head=head, by_module=by_module, dtype=dtype)
    save_adapter(adapter, tmp_path / "a")
    found = load_adapter(tmp_path / "a")
    assert found.merge == adapter.merge
    assert found.lora == adapter.lora
    for part in ("lora_weights", "encoder_weights", "head_weights"):
        theirs, ours = getattr(adapter, part), getattr(found, part)
        assert theirs.keys() == ours.keys()
        for name, array in theirs.items():
            assert ours[name].dtype == dtype
            assert mx.array_equal(ours[name].view(mx.uint16), array.view(mx.uint16))


def test_saving_what_was_loaded_gives_the_same_files(tmp_path):
    save_adapter(load_adapter(saved(tmp_path / "a")), tmp_path / "b")
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_adapter_can_be_saved_over_the_one_it_was_loaded_from(tmp_path):
    """Tensors are read lazily: they must be read before their file goes."""
    path = saved(tmp_path / "a")
    before = {name: (path / name).read_bytes() for name in FILES}
    save_adapter(load_adapter(path), path)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_folder_holds_the_four_files_and_standard_safetensors(tmp_path):
    path = saved(tmp_path / "a")
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    stored = load_file(path / "merge_encoder.safetensors")
    assert stored["encoder.w1.weight"].shape == (12, 4 * D)
    assert stored["lm_head.lora_b"].shape == (R, V)
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["lora_parameters"]["scale"] == 8.0
    assert config["model"] == "some/base"


# ---- strict loading ----


def test_every_tensor_that_is_missing_extra_or_misshapen_is_listed_with_its_shapes(tmp_path):
    adapter = make()
    del adapter.encoder_weights["w2.bias"]
    adapter.encoder_weights["w1.weight"] = mx.zeros((12, 3))
    adapter.encoder_weights["w9.weight"] = mx.zeros((5, 6))
    adapter.head_weights["lora_a"] = mx.zeros((D + 1, R))
    del adapter.head_weights["lora_b"]
    del adapter.lora_weights[f"model.layers.0.{Q}.lora_b"]
    adapter.lora_weights[f"model.layers.1.{Q}.lora_a"] = mx.zeros((D, R + 1))
    adapter.lora_weights["model.norm.weight"] = mx.zeros((D,))
    save_adapter(adapter, tmp_path / "a")
    lines = refused(tmp_path / "a").splitlines()
    assert lines[0].endswith("8 problems")
    for line, parts in zip(
        sorted(lines[1:]),
        [
            ("adapters", f"model.layers.0.{Q}.lora_b is missing"),
            (
                "adapters",
                f"model.layers.1.{Q} has lora_a (8, 3) and lora_b (2, 6), expected (in, 2)",
            ),
            ("adapters", "model.norm.weight (8,) belongs to nothing here"),
            ("merge_encoder", "encoder.w1.weight has shape (12, 3), expected (12, 32)"),
            ("merge_encoder", "encoder.w2.bias is missing, expected shape (32,)"),
            ("merge_encoder", "encoder.w9.weight (5, 6) belongs to nothing here"),
            ("merge_encoder", "lm_head.lora_a has shape (9, 2), expected (8, 2)"),
            ("merge_encoder", "lm_head.lora_b is missing, expected shape (2, "),
        ],
        strict=True,
    ):
        assert line.startswith(f"  - {parts[0]}.safetensors: {parts[1]}")


def test_a_head_that_the_config_does_not_name_is_refused(tmp_path):
    adapter = make(head=False)
    adapter.head_weights["lora_a"] = mx.zeros((D, R))
    save_adapter(adapter, tmp_path / "a")
    assert "lm_head.lora_a (8, 2) belongs to nothing here" in refused(tmp_path / "a")


@pytest.mark.parametrize("shape", [(), (V,), (R, V, 1), (R + 1, V)])
def test_a_head_of_any_other_shape_is_refused_with_both(tmp_path, shape):
    adapter = make()
    adapter.head_weights["lora_b"] = mx.zeros(shape)
    save_adapter(adapter, tmp_path / "a")
    assert f"lm_head.lora_b has shape {shape}, expected (2, " in refused(tmp_path / "a")


def test_modules_and_keys_without_tensors_are_refused(tmp_path):
    for by_module in (False, True):
        adapter = make(by_module=by_module)
        for name in [n for n in adapter.lora_weights if UP in n]:
            del adapter.lora_weights[name]
        save_adapter(adapter, tmp_path / "a")
        text = refused(tmp_path / "a")
        assert (f"model.layers.0.{UP}.lora_a is missing" if by_module else f"key {UP} has") in text


def test_the_experts_layout_of_mlx_lm_is_accepted_at_its_rank(tmp_path):
    adapter, experts = make(), LoRASwitchLinear(D, 6, 5, r=R)
    for layer in (0, 1):
        for part in ("lora_a", "lora_b"):
            adapter.lora_weights[f"model.layers.{layer}.{UP}.{part}"] = experts[part]
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a")
    adapter.lora_weights[f"model.layers.0.{UP}.lora_b"] = mx.zeros((5, 6, R + 1))
    save_adapter(adapter, tmp_path / "a")
    assert "lora_b (5, 6, 3)" in refused(tmp_path / "a")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    path = saved(tmp_path / "a")
    (path / name).unlink()
    text = refused(path)
    assert name in text
    assert "\n" not in text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_file_is_named(tmp_path, name, keep):
    path = saved(tmp_path / "a")
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(keep * len(content))])
    assert name in refused(path)


@pytest.mark.parametrize("name", ["adapter_config.json", "merge_config.json"])
@pytest.mark.parametrize("content", ["null", "[]", "3", '"x"', "{}"])
def test_a_config_of_the_wrong_kind_is_one_line(tmp_path, name, content):
    path = saved(tmp_path / "a")
    (path / name).write_text(content)
    text = refused(path)
    assert str(path) in text
    assert name in text
    assert "\n" not in text


def test_a_newer_format_asks_for_an_update(tmp_path):
    path = saved(tmp_path / "a")
    change(path, "merge_config.json", format_version=FORMAT_VERSION + 1)
    assert "is newer than this release reads (1): update kmerge-mlx" in refused(path)
    for wrong in (0, None, "1", True, 1.0):
        change(path, "merge_config.json", format_version=wrong)
        assert f"format_version is {wrong!r}, expected 1" in refused(path)


@pytest.mark.parametrize(
    "values",
    [
        {"merge_factor": 1},
        {"merge_factor": "4"},
        {"merge_factor": 10**30},
        {"merge_factor": 10**18, "hidden_size": 10**18},
        {"hidden_size": None},
        {"inner_size": 12.0},
        {"pad_token_id": "7"},
        {"pad_token_id": -1},
        {"base_model": []},
        {"base_model": {"id": 3}},
        {"layout": "prompt"},
        {"head_lora": {"rank": 2}},
        {"head_lora": {"rank": 2, "scale": float("nan")}},
        {"head_lora": {"rank": 2**40, "scale": 1.0}},
    ],
    ids=str,
)
def test_a_merge_config_with_a_wrong_entry_is_refused(tmp_path, values):
    path = saved(tmp_path / "a")
    change(path, "merge_config.json", **values)
    text = refused(path)
    assert str(path) in text.splitlines()[0]


@pytest.mark.parametrize(
    "values",
    [
        {"fine_tune_type": "dora"},
        {"num_layers": "2"},
        {"lora_parameters": None},
        {"lora_parameters": {"rank": 2, "scale": 8.0, "dropout": 1.0, "keys": [Q, UP]}},
        {"lora_parameters": {"rank": 3, "scale": 8.0, "dropout": 0.0, "keys": [Q, UP]}},
        {"lora_parameters": {"rank": 2, "scale": "8", "dropout": 0.0, "keys": [Q, UP]}},
        {"lora_parameters": {"rank": 2**40, "scale": 8.0, "dropout": 0.0, "keys": [Q, UP]}},
        {"lora_parameters": {"rank": 2, "scale": 8.0, "dropout": 0.0, "keys": [Q, UP, "k_proj"]}},
        {"lora_parameters": {"rank": 2, "scale": 8.0, "dropout": 0.0, "keys": [Q]}},
        {"lora_parameters": {"rank": 2, "scale": 8.0, "dropout": 0.0}},
        {"lora_parameters": {"dropout": 0.0, "modules": {"x": {"rank": 2, "scale": 8.0}}}},
        {"lora_parameters": {"dropout": 0.0, "modules": {"x": {"rank": 2}}}},
        {"peft_type": "LORA", "lora_parameters": {"modules": []}},
    ],
    ids=str,
)
def test_a_lora_config_with_a_wrong_entry_is_refused(tmp_path, values):
    path = saved(tmp_path / "a")
    change(path, "adapter_config.json", **values)
    text = refused(path)
    assert str(path) in text.splitlines()[0]


# ---- several K in one folder ----


def test_a_folder_of_several_k_asks_which_and_gives_each(tmp_path):
    for k in (10, 2, 4):
        saved(tmp_path / f"k{k}", k=k)
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("")
    assert [*find_adapters(tmp_path).items()] == [
        *((2, tmp_path / "k2"), (4, tmp_path / "k4"), (10, tmp_path / "k10"))
    ]
    for k in (2, 4, 10):
        assert load_adapter(tmp_path, k).merge.encoder.merge_factor == k
    assert "holds adapters for K = 2, 4, 10: choose one with --k" in refused(tmp_path)
    assert "holds no adapter for --k 3: it has K = 2, 4, 10" in refused(tmp_path, 3)
    assert "holds no adapter for --k 3: it has K = 4" in refused(tmp_path / "k4", 3)


def test_two_adapters_of_one_k_are_not_picked_from_by_chance(tmp_path):
    saved(tmp_path / "old", k=4)
    saved(tmp_path / "new", k=4)
    assert "several adapters for K = 4: name one of new, old" in refused(tmp_path, 4)


def test_what_a_killed_run_left_is_not_offered_as_an_adapter(tmp_path):
    saved(tmp_path / "k4", k=4)
    saved(tmp_path / ".k2.new-123-abc", k=2)
    assert list(find_adapters(tmp_path)) == [4]


# ---- folders that are something else ----


def test_what_a_folder_is_instead_is_said(tmp_path, checkpoint_path, base_path):
    peft, mlx, sub, nothing = (tmp_path / name for name in ("peft", "mlx", "sub", "nothing"))
    shutil.copytree(checkpoint_path, peft)
    (peft / "encoder.pth").unlink()
    shutil.copytree(checkpoint_path, sub / "best")
    saved(mlx)
    (mlx / "merge_config.json").unlink()
    nothing.mkdir()
    for path, what in (
        (
            checkpoint_path,
            f"is a PyTorch checkpoint: run `kmerge-mlx convert {checkpoint_path} DST`",
        ),
        (sub, f"holds PyTorch checkpoints: run `kmerge-mlx convert {sub} DST` first"),
        (peft, "is a PEFT adapter without a merge encoder: convert the whole checkpoint folder"),
        (mlx, "is an mlx-lm adapter without a merge encoder (merge_config.json is missing)"),
        (base_path, "is a base model, not an adapter: give it as --model"),
        (nothing, "is no adapter folder: merge_config.json is missing"),
        (tmp_path / "absent", "is not a folder: --adapter-path takes a converted adapter"),
        (base_path / "config.json", "is not a folder: --adapter-path takes a converted adapter"),
        (tmp_path / ("x" * 300), "is not a folder"),
    ):
        text = refused(path)
        assert text.startswith((f"{path} ", "cannot read"))
        assert what in text or "File name too long" in text
    (mlx / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in refused(mlx)


# ---- where an adapter may be written ----


def test_a_new_place_is_free_and_an_old_one_needs_force(tmp_path):
    check_destination(tmp_path / "new", force=False)
    check_destination(tmp_path / "new", force=True)
    path = saved(tmp_path / "a")
    check_destination(path, force=True)
    with pytest.raises(AdapterError, match="exists: choose another folder, or give --force"):
        check_destination(path, force=False)


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link", "dangling", "several"])
def test_force_replaces_nothing_but_an_adapter(tmp_path, kind):
    path = tmp_path / "dst"
    if kind == "folder":
        path.mkdir()
        (path / "precious.txt").write_text("1")
    elif kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("1")
    elif kind == "link":
        path.symlink_to(saved(tmp_path / "a"))
    elif kind == "dangling":
        path.symlink_to(tmp_path / "absent")
    else:
        saved(path / "k4")
    with pytest.raises(AdapterError, match="is no adapter folder, and --force replaces nothing"):
        check_destination(path, force=True)
    with pytest.raises(AdapterError, match="exists"):
        check_destination(path, force=False)


def test_force_does_not_delete_what_lies_beside_an_adapter(tmp_path):
    path = saved(tmp_path / "a")
    (path / "training").mkdir()
    with pytest.raises(AdapterError, match=r"holds more than an adapter \(training\): move that"):
        check_destination(path, force=True)


def test_a_name_that_no_disk_takes_is_one_line(tmp_path):
    with pytest.raises(AdapterError, match=r"cannot write .*File name too long"):
        check_destination(tmp_path / ("x" * 300), force=False)


def test_a_place_inside_a_file_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("1")
    check_destination(tmp_path / "file" / "a", force=False)
    with pytest.raises(AdapterError, match=r"cannot write .*/file/a: "):
        save_adapter(make(), tmp_path / "file" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_loop_of_links_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(AdapterError, match="cannot write"):
        save_adapter(make(), tmp_path / "loop" / "a")


def test_a_folder_that_a_killed_run_was_replacing_is_given_back_before_it_is_asked_about(tmp_path):
    pid = subprocess.check_output(
        [sys.executable, "-c", "import os; print(os.getpid())"], text=True
    )
    saved(tmp_path / f".a.old-{int(pid)}-x")
    with pytest.raises(AdapterError, match="exists"):
        check_destination(tmp_path / "a", force=False)
    assert load_adapter(tmp_path / "a").merge.encoder.merge_factor == 4
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_a_save_that_fails_leaves_the_adapter_that_was_there(tmp_path):
    path = saved(tmp_path / "a")
    before = {name: (path / name).read_bytes() for name in FILES}
    adapter = make(k=2)
    huge = MergeConfig(adapter.merge.encoder, provenance={"log": "x" * (2 << 20)})
    broken = Adapter(huge, adapter.lora, adapter.lora_weights, adapter.encoder_weights)
    with pytest.raises(
        AdapterError, match=r"cannot write .*merge_config\.json would be over 1 MiB"
    ):
        save_adapter(broken, path)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_numpy_reads_the_same_numbers(tmp_path):
    adapter = make()
    save_adapter(adapter, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapters.safetensors")
    assert stored.keys() == adapter.lora_weights.keys()
    for name, array in stored.items():
        assert array.tobytes() == np.array(adapter.lora_weights[name]).tobytes()
