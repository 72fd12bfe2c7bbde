"""The files of an adapter folder: strict on the way in, bit for bit on the way out."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tuner.lora import LoRASwitchLinear
from safetensors.numpy import load_file

from kmerge_mlx.adapters.folder import FILES, load_adapter, save_adapter
from kmerge_mlx.adapters.schema import FORMAT_VERSION
from tests.saved_adapters import UP, D, Q, R, V, make, refused, saved


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
    assert found.tuning == adapter.tuning
    for part in ("tuning_weights", "encoder_weights", "head_weights"):
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
    del adapter.tuning_weights[f"model.layers.0.{Q}.lora_b"]
    adapter.tuning_weights[f"model.layers.1.{Q}.lora_a"] = mx.zeros((D, R + 1))
    adapter.tuning_weights["model.norm.weight"] = mx.zeros((D,))
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
        for name in [n for n in adapter.tuning_weights if UP in n]:
            del adapter.tuning_weights[name]
        save_adapter(adapter, tmp_path / "a")
        text = refused(tmp_path / "a")
        assert (f"model.layers.0.{UP}.lora_a is missing" if by_module else f"key {UP} has") in text


def test_the_experts_layout_of_mlx_lm_is_accepted_at_its_rank(tmp_path):
    adapter, experts = make(), LoRASwitchLinear(D, 6, 5, r=R)
    for layer in (0, 1):
        for part in ("lora_a", "lora_b"):
            adapter.tuning_weights[f"model.layers.{layer}.{UP}.{part}"] = experts[part]
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a")
    adapter.tuning_weights[f"model.layers.0.{UP}.lora_b"] = mx.zeros((5, 6, R + 1))
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
