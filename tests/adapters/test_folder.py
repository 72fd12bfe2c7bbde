"""Adapter folders: strict when read, bit for bit when written, replaced whole or not at all."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.lora import LoRASwitchLinear
from safetensors.numpy import load_file

from kmerge_mlx.adapters.folder import (
    FILES,
    Adapter,
    check_adapter_destination,
    find_adapters,
    load_adapter,
    save_adapter,
)
from kmerge_mlx.adapters.schema import MergeConfig
from kmerge_mlx.errors import AdapterError
from tests.cli_runner import change_json
from tests.conversions import assert_same_tensors
from tests.saved_adapters import UP, D, Q, R, V, make, refused, saved


@pytest.mark.parametrize(
    ("head", "by_module", "dtype"),
    [(True, False, mx.float32), (False, True, mx.float16), (True, True, mx.bfloat16)],
)
def test_what_is_saved_is_loaded_bit_for_bit_and_saved_the_same(tmp_path, head, by_module, dtype):
    adapter = make(head=head, by_module=by_module, dtype=dtype)
    save_adapter(adapter, tmp_path / "a")
    found = load_adapter(tmp_path / "a")
    assert (found.merge, found.tuning) == (adapter.merge, adapter.tuning)
    assert_same_tensors(found, adapter)
    assert {array.dtype for array in found.tuning_weights.values()} == {dtype}
    save_adapter(found, tmp_path / "b")
    before = {name: (tmp_path / "a" / name).read_bytes() for name in FILES}
    assert {name: (tmp_path / "b" / name).read_bytes() for name in FILES} == before
    # Tensors are read lazily: over their own file, they must be read before it goes.
    save_adapter(load_adapter(tmp_path / "a"), tmp_path / "a")
    assert {name: (tmp_path / "a" / name).read_bytes() for name in FILES} == before


def test_the_folder_holds_the_four_files_and_standard_safetensors(tmp_path):
    adapter, path = make(), saved(tmp_path / "a")
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    stored = load_file(path / "merge_encoder.safetensors")
    assert stored["encoder.w1.weight"].shape == (12, 4 * D)
    assert stored["lm_head.lora_b"].shape == (R, V)
    for name, array in load_file(path / "adapters.safetensors").items():
        assert array.tobytes() == np.array(adapter.tuning_weights[name]).tobytes()
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["lora_parameters"]["scale"] == 8.0
    assert config["model"] == "some/base"


def test_every_tensor_that_is_missing_extra_or_misshapen_is_listed_with_its_shapes(tmp_path):
    adapter = make()
    del adapter.encoder_weights["w2.bias"]
    adapter.encoder_weights["w1.weight"] = mx.zeros((12, 3))
    adapter.encoder_weights["w9.weight"] = mx.zeros((5, 6))
    adapter.head_weights["lora_a"] = mx.zeros((D + 1, R))
    del adapter.head_weights["lora_b"]
    del adapter.tuning_weights[f"model.layers.0.{Q}.lora_b"]
    adapter.tuning_weights[f"model.layers.1.{Q}.lora_a"] = mx.zeros((D, R + 1))
    adapter.tuning_weights["model.norm.weight"] = mx.zeros((D,))
    for name in [name for name in adapter.tuning_weights if UP in name]:
        del adapter.tuning_weights[name]
    save_adapter(adapter, tmp_path / "a")
    lines = refused(tmp_path / "a").splitlines()
    assert lines[0].endswith("9 problems")
    for line, (file, text) in zip(
        sorted(lines[1:]),
        [
            ("adapters", f"key {UP} has no tensors"),
            ("adapters", f"model.layers.0.{Q}.lora_b is missing"),
            ("adapters", f"model.layers.1.{Q}.lora_a has shape (8, 3), expected (8, 2)"),
            ("adapters", "model.norm.weight (8,) belongs to nothing here"),
            ("merge_encoder", "encoder.w1.weight has shape (12, 3), expected (12, 32)"),
            ("merge_encoder", "encoder.w2.bias is missing, expected shape (32,)"),
            ("merge_encoder", "encoder.w9.weight (5, 6) belongs to nothing here"),
            ("merge_encoder", "lm_head.lora_a has shape (9, 2), expected (8, 2)"),
            ("merge_encoder", "lm_head.lora_b is missing, expected shape (2, "),
        ],
        strict=True,
    ):
        assert line.startswith(f"  - {file}.safetensors: {text}")


def test_the_experts_layout_of_mlx_lm_is_accepted_at_its_rank(tmp_path):
    adapter, experts = make(), LoRASwitchLinear(D, 6, 5, r=R)
    for layer in (0, 1):
        for part in ("lora_a", "lora_b"):
            adapter.tuning_weights[f"model.layers.{layer}.{UP}.{part}"] = experts[part]
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a")
    adapter.tuning_weights[f"model.layers.0.{UP}.lora_b"] = mx.zeros((5, 6, R + 1))
    save_adapter(adapter, tmp_path / "a")
    assert "lora_b has shape (5, 6, 3), expected (5, 6, 2)" in refused(tmp_path / "a")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_torn_file_is_named(tmp_path, name):
    path = saved(tmp_path / "a")
    content = (path / name).read_bytes()
    for keep in (0.0, 0.01, 0.5, 0.99):
        (path / name).write_bytes(content[: int(keep * len(content))])
        assert name in refused(path)
    (path / name).unlink()
    text = refused(path)
    assert name in text
    assert "\n" not in text


def test_configs_with_wrong_entries_are_refused_by_the_name_of_their_folder(tmp_path):
    lora = {"rank": 2, "scale": 8.0, "dropout": 0.0, "keys": [Q, UP]}
    path = saved(tmp_path / "a")
    for name, values in (
        ("merge_config.json", {"merge_factor": 10**18, "hidden_size": 10**18}),
        ("merge_config.json", {"head_lora": {"rank": 2**40, "scale": 1.0}}),
        ("adapter_config.json", {"lora_parameters": lora | {"rank": 2**40}}),
        ("adapter_config.json", {"lora_parameters": lora | {"keys": [Q, UP, "k_proj"]}}),
        ("adapter_config.json", {"lora_parameters": {"modules": {"x": {"rank": 2, "scale": 8.0}}}}),
    ):
        kept = (path / name).read_text()
        change_json(path / name, **values)
        assert str(path) in refused(path).splitlines()[0], values
        (path / name).write_text(kept)
    for name in ("adapter_config.json", "merge_config.json"):
        kept = (path / name).read_text()
        for content in ("null", "[]", "3", '"x"', "{}"):
            (path / name).write_text(content)
            text = refused(path)
            assert str(path) in text
            assert name in text
            assert "\n" not in text
        (path / name).write_text(kept)


def test_a_folder_of_several_k_asks_which_and_gives_each(tmp_path):
    for k in (10, 2, 4):
        saved(tmp_path / f"k{k}", k=k)
    saved(tmp_path / ".k3.new-123-abc", k=3)  # what a killed run left
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("")
    assert list(find_adapters(tmp_path)) == [2, 4, 10]
    for k in (2, 4, 10):
        assert find_adapters(tmp_path)[k] == tmp_path / f"k{k}"
        assert load_adapter(tmp_path, k).merge.merge_factor == k
    assert "holds adapters for K = 2, 4, 10: choose one with `k`" in refused(tmp_path)
    assert "holds no adapter for `k` 3: it has K = 2, 4, 10" in refused(tmp_path, 3)
    assert "holds no adapter for `k` 3: it has K = 4" in refused(tmp_path / "k4", 3)
    saved(tmp_path / "new", k=4)
    assert "several adapters for K = 4: name one of k4, new" in refused(tmp_path, 4)


def test_what_a_folder_is_instead_is_said(tmp_path, checkpoint_path, base_path):
    peft, mlx, sub, nothing = (tmp_path / name for name in ("peft", "mlx", "sub", "nothing"))
    shutil.copytree(checkpoint_path, peft)
    (peft / "encoder.pth").unlink()
    shutil.copytree(checkpoint_path, sub / "best")
    saved(mlx)
    (mlx / "merge_config.json").unlink()
    nothing.mkdir()
    for path, what in (
        (checkpoint_path, f"is a PyTorch checkpoint: run `kmerge-mlx convert {checkpoint_path}"),
        (sub, f"holds PyTorch checkpoints: run `kmerge-mlx convert {sub} DST` first"),
        (peft, "is a PEFT adapter without a merge encoder: convert the whole checkpoint folder"),
        (mlx, "is an mlx-lm adapter without a merge encoder (merge_config.json is missing)"),
        (base_path, "is a base model, not an adapter: give it as `model`"),
        (nothing, "is not an adapter folder: merge_config.json is missing"),
        (tmp_path / "absent", "is not a folder: expected an adapter"),
        (base_path / "config.json", "is not a folder: expected an adapter"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert what in refused(path)


def test_force_replaces_nothing_but_an_adapter(tmp_path):
    kinds = ("empty", "file", "link", "dangling", "several")
    empty, file, link, dangling, several = places = [tmp_path / kind for kind in kinds]
    empty.mkdir()
    file.write_text("1")
    link.symlink_to(saved(tmp_path / "a"))
    dangling.symlink_to(tmp_path / "absent")
    saved(several / "k4")
    for path in places:
        why = "a symbolic link" if path.is_symlink() else "not a folder of adapter files"
        with pytest.raises(AdapterError, match=rf"is {why}(,|:).* replaces "):
            check_adapter_destination(path, force=True)
        with pytest.raises(AdapterError, match="exists"):
            check_adapter_destination(path, force=False)


def test_a_save_that_fails_leaves_the_adapter_that_was_there(tmp_path):
    path = saved(tmp_path / "a")
    before = {name: (path / name).read_bytes() for name in FILES}
    adapter = make(k=2)
    huge = MergeConfig(adapter.merge.encoder, provenance={"log": "x" * (2 << 20)})
    broken = Adapter(huge, adapter.tuning, adapter.tuning_weights, adapter.encoder_weights)
    with pytest.raises(AdapterError, match=r"cannot write .*merge_config\.json would be over 1 Mi"):
        save_adapter(broken, path)
    (tmp_path / "file").write_text("1")
    with pytest.raises(AdapterError, match=r"cannot write .*/file/a: "):
        save_adapter(make(), tmp_path / "file" / "a")
    assert {name: (path / name).read_bytes() for name in FILES} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file"]
