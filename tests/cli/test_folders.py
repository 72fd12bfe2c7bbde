"""``kmerge-mlx convert`` and ``kmerge-mlx info``: what they print, and where."""

from __future__ import annotations

import json
import shutil

import pytest

from kmerge_mlx.adapters.folder import save_adapter
from tests.cli_runner import assert_one_error, change_json, run
from tests.tiny import build, qwen2_config, random_adapter, write_base


def test_convert_prints_one_line_on_stderr(checkpoint_path, base_path, tmp_path):
    result = run("convert", checkpoint_path, tmp_path / "a", "--model", base_path, "--k", 4)
    assert (result.code, result.out) == (0, "")
    assert result.err == (f"{tmp_path}/a: K = 4, D = 64, 50 tensors, 0.9 MB, base {base_path}\n")


def test_convert_replaces_an_adapter_only_when_told(checkpoint_path, tmp_path):
    args = ("convert", checkpoint_path, tmp_path / "a")
    result = run(*args)
    assert result.code == 0
    assert result.err.splitlines()[0].endswith("base Qwen/Qwen2.5-0.5B")  # as the checkpoint says
    assert result.err.splitlines()[1].startswith("note: without --model, only sizes")
    assert run("info", checkpoint_path).out.startswith(f"{checkpoint_path}: checkpoint\nK = 4\n")
    assert_one_error(run(*args), 1, "exists", "--force")
    assert "0.5 MB" in run(*args, "--force", "--dtype", "bfloat16").err
    found = json.loads(run("info", tmp_path / "a", "--json").out)
    assert found["adapters"][0]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [(("--k", 3), 1, "--k is 3"), (("--k", 0), 2, "--k"), (("--dtype", "int8"), 2, "--dtype")],
)
def test_convert_writes_nothing_on_an_error(checkpoint_path, tmp_path, args, code, said):
    result = run("convert", checkpoint_path, tmp_path / "a", *args)
    assert_one_error(result, code, said)
    assert list(tmp_path.iterdir()) == []


def test_info_says_what_an_adapter_is(adapter_path, base_path):
    result = run("info", adapter_path)
    assert (result.code, result.err) == (0, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[:2] == [f"{adapter_path}: adapter", "K = 4"]
    assert "encoder D = 64, H = 384, 213,696 parameters, 0.9 MB float32" in lines
    assert "LoRA 22 modules, rank 4, scale 4, 0.1 MB" in lines
    assert f"base {base_path}" in lines
    assert "rope_theta 10000.0" in lines
    assert "padding token 223" in lines


def test_info_as_json_is_one_object(adapter_path, base_path):
    result = run("info", adapter_path, "--json")
    assert result.out.count("\n") == 1
    found = json.loads(result.out)
    assert (found["kind"], found["path"]) == ("adapter", str(adapter_path))
    (adapter,) = found["adapters"]
    assert adapter["merge_factor"] == 4
    assert adapter["encoder_bytes"] == 4 * adapter["encoder_parameters"] == 854_784
    assert adapter["base_model"] == str(base_path)
    assert adapter["base_config_hash"].startswith("sha256:")
    assert adapter["provenance"]["metrics"] == {"merge_factor": 4}


def test_info_lists_every_k_of_a_folder(tmp_path):
    model = build(qwen2_config())
    for k in (5, 2, 3):
        save_adapter(random_adapter(model, k), tmp_path / f"k{k}")
    result = run("info", tmp_path)
    assert (result.code, result.err) == (0, "")
    assert [line for line in result.out.splitlines() if line[0] != " "] == [
        f"{tmp_path}: adapter",
        *("K = 2", "K = 3", "K = 5"),
    ]


def test_info_says_what_an_adapter_does_not_say(adapter_path, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_path, folder)
    change_json(folder / "merge_config.json", base_model=None, layout=None, pad_token_id=None)
    result = run("info", folder)
    assert "not named (its config was not recorded: converted without --model)" in result.out
    assert "from the tokenizer" in result.out
    assert "layout" not in result.out


def test_info_says_what_a_base_is(base_path, tmp_path):
    result = run("info", base_path)
    assert (result.code, result.err) == (0, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[0] == f"{base_path}: base model"
    assert {"context 2048 positions", "quantization none"} <= set(lines)
    assert "merging proven by this project's tests" in lines
    quantization = {"group_size": 64, "bits": 4}
    base = write_base(tmp_path / "other", qwen2_config(max_position_embeddings=None))
    change_json(base / "config.json", quantization=quantization, model_type="phi3")
    lines = [" ".join(line.split()) for line in run("info", base).out.splitlines()]
    assert {"context unknown", "quantization 4 bits"} <= set(lines)
    assert "merging checked when an adapter is loaded" in lines
