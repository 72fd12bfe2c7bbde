"""``kmerge-mlx convert`` and ``kmerge-mlx info``: what they print, and where."""

from __future__ import annotations

import json
import shutil

from kmerge_mlx.adapters.folder import save_adapter
from tests.cli_runner import assert_one_error, change_json, run
from tests.tiny import build, qwen2_config, random_adapter, write_base


def told(*args):
    """The lines that ``info`` prints."""
    result = run("info", *args)
    assert (result.code, result.err) == (0, "")
    return [" ".join(line.split()) for line in result.out.splitlines()]


def test_convert_prints_one_line_and_replaces_an_adapter_only_when_told(
    checkpoint_path, base_path, tmp_path
):
    args = ("convert", checkpoint_path, tmp_path / "a")
    result = run(*args, "--model", base_path, "--k", 4)
    assert (result.code, result.out) == (0, "")
    assert result.err == f"{tmp_path}/a: K = 4, D = 64, 50 tensors, 0.9 MB, base {base_path}\n"
    assert_one_error(run(*args), 1, "exists", "--force")
    result = run(*args, "--force", "--dtype", "bfloat16")
    first, second = result.err.splitlines()
    assert "0.5 MB" in first
    assert first.endswith("base Qwen/Qwen2.5-0.5B")  # as the checkpoint says
    assert second.startswith("note: without --model, only sizes")
    found = json.loads(run("info", tmp_path / "a", "--json").out)
    assert found["adapters"][0]["dtype"] == "bfloat16"


def test_info_says_what_a_checkpoint_and_an_adapter_are(checkpoint_path, adapter_path, base_path):
    assert told(checkpoint_path)[:2] == [f"{checkpoint_path}: checkpoint", "K = 4"]
    lines = told(adapter_path)
    assert lines[:2] == [f"{adapter_path}: adapter", "K = 4"]
    assert {
        "encoder D = 64, H = 384, 213,696 parameters, 0.9 MB float32",
        "LoRA 22 modules, rank 4, scale 4, 0.1 MB",
        *(f"base {base_path}", "rope_theta 10000.0", "padding token 223"),
    } <= set(lines)
    (line,) = told(adapter_path, "--json")
    found = json.loads(line)
    assert (found["kind"], found["path"]) == ("adapter", str(adapter_path))
    (adapter,) = found["adapters"]
    assert adapter["merge_factor"] == 4
    assert adapter["encoder_bytes"] == 4 * adapter["encoder_parameters"] == 854_784
    assert adapter["base_model"] == str(base_path)
    assert adapter["base_config_hash"].startswith("sha256:")
    assert adapter["provenance"]["metrics"] == {"merge_factor": 4}


def test_info_lists_every_k_of_a_folder_and_says_what_is_not_recorded(adapter_path, tmp_path):
    model = build(qwen2_config())
    for k in (5, 2, 3):
        save_adapter(random_adapter(model, k), tmp_path / f"k{k}")
    lines = told(tmp_path)
    assert lines[0] == f"{tmp_path}: adapter"
    assert [line for line in lines if line.startswith("K = ")] == ["K = 2", "K = 3", "K = 5"]
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_path, folder)
    change_json(folder / "merge_config.json", base_model=None, layout=None, pad_token_id=None)
    text = "\n".join(told(folder))
    assert "not named (its config was not recorded: converted without --model)" in text
    assert "from the tokenizer" in text
    assert "layout" not in text


def test_info_says_what_a_base_is(base_path, tmp_path):
    lines = told(base_path)
    assert lines[0] == f"{base_path}: base model"
    wanted = {"context 2048 positions", "quantization none"}
    assert {*wanted, "merging proven by this project's tests"} <= set(lines)
    base = write_base(tmp_path / "other", qwen2_config(max_position_embeddings=None))
    quantization = {"group_size": 64, "bits": 4}
    change_json(base / "config.json", quantization=quantization, model_type="phi3")
    wanted = {"context unknown", "quantization 4 bits"}
    assert {*wanted, "merging checked when an adapter is loaded"} <= set(told(base))
