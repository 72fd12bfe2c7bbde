"""``kmerge-mlx info`` and ``convert``: folders, the calculator's tables, a run and its scores."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.tools.sizing import SizingConfig, calculate
from tests.cli_runner import assert_one_error, change_json, run
from tests.tiny import build, qwen2_config, random_adapter, write_base
from tests.train_runs import SMALL_TREES, kmerge, trained

CONFIGS = Path(__file__).parents[1] / "fixtures/configs"


def folder_of(tmp_path: Path, config: str) -> Path:
    """A base of which there is the config alone."""
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(CONFIGS / f"{config}.json", folder / "config.json")
    return folder


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


GUIDE = (Path(__file__).parents[2] / "docs/choosing-k.md").read_text()


def test_the_guide_shows_what_its_command_prints(tmp_path):
    base = folder_of(tmp_path, "qwen2.5-0.5b")
    (command,) = [line for line in GUIDE.splitlines() if line.startswith("kmerge-mlx info")]
    name, args = "Qwen/Qwen2.5-0.5B", command.split()[1:]
    result = run(*[str(base) if arg == name else arg for arg in args])
    printed = result.out.split("\n\nK = 1")[0].replace(str(base), name)
    assert f"```\n{printed}\n```" in GUIDE


def test_the_guide_compares_with_what_is_calculated(tmp_path):
    base = folder_of(tmp_path, "qwen2.5-0.5b")
    asked = SizingConfig((512, 2048), (2, 4, 8), dtype="float32")
    for row in calculate(str(base), asked)["rows"]:
        if row["k"] > 1:
            cells = f"| {row['k']} | {row['speedup_floor']:.2f}x | {row['work_ratio']:.2f}x |"
            assert cells in GUIDE


def test_as_json_it_is_one_object_with_what_was_assumed(tmp_path):
    base = folder_of(tmp_path, "qwen2.5-7b")
    options = ("--memory", "32GB", "--kv-bits", 4, "--quantized-kv-start", 0, "--dtype", "float16")
    result = run("info", "--model", base, "--length", 1000, "--k", 3, *options, "--json")
    assert result.out.count("\n") == 1
    found = json.loads(result.out)
    assert found["kind"] == "calculation"
    usable = int((32 << 30) * found["assumed"]["usable_share_of_memory"])
    config = SizingConfig((1000,), (1, 3), "float16", usable, kv_bits=4, quantized_kv_start=0)
    memory = {"model": str(base), "memory_bytes": 32 << 30}
    assert found["settings"] == memory | json.loads(json.dumps(asdict(config)))
    assert {name: found[name] for name in ("base", "factors", "rows")} == calculate(base, config)


def test_memory_adds_what_fits_and_positions_past_the_context_are_marked(tmp_path):
    base = folder_of(tmp_path, "mistral-7b-v0.1")
    asked = ("--length", 40_000, "--k", 4, "--memory", "24 gib")
    result = run("info", "--model", base, *asked)
    lines = lines_of(result.out)
    assert "K encoder its size longest prompt in 24 GB ends at" in lines
    assert "1 none - 20,480 tokens memory" in lines
    assert any(line.startswith("40,000 tokens 1 40,000* 5.24 GB 19.8 GB no") for line in lines)
    assert any(line.startswith("* more positions than") for line in lines)
    assert any(line.startswith("fits memory within 67%") for line in lines)


def test_a_cache_of_limited_size_is_said_to_be_ignored_where_mlx_lm_ignores_it(tmp_path):
    asked = ("--length", 1000, "--max-kv-size", 100, "--k", 1)
    base = folder_of(tmp_path, "llama-3.2-1b")
    result = run("info", "--model", base, *asked)
    assert result.err == ("note: mlx-lm's llama makes its own KV cache and ignores --max-kv-size\n")
    assert "32.8 MB" in result.out
    shutil.copy(CONFIGS / "qwen2.5-0.5b.json", base / "config.json")
    result = run("info", "--model", base, *asked)
    assert result.err == ""
    assert "1.23 MB" in result.out


def test_the_bundled_model_is_calculated_in_the_dtype_that_it_runs_in():
    result = run("info", "--model", "bundled", "--length", 100)
    assert (result.code, result.err) == (0, "")
    assert "(float32, from its weights' headers)" in result.out


def test_of_a_repo_the_config_alone_is_fetched(tmp_path, monkeypatch):
    base, seen = folder_of(tmp_path, "qwen2.5-0.5b"), []

    def fetch(repo, patterns, error, revision=None):
        seen.append((repo, patterns))
        return base

    monkeypatch.setattr("kmerge_mlx.base.fetch", fetch)
    assert run("info", "--model", "Qwen/Qwen2.5-0.5B", "--length", 10).code == 0
    ((repo, patterns),) = seen
    assert repo == "Qwen/Qwen2.5-0.5B"
    assert not [pattern for pattern in patterns if "safetensors" in pattern]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "found neither PATH and --model, expected one of them"),
        (("a", "--model", "b"), "found both PATH and --model, expected one of them"),
        (("--model", "b"), "--model needs a --length"),
        (("a", "--length", 5), "--length is an option of --model, not of a PATH"),
        (("--model", "b", "--length", 5, "--memory", "16"), "--memory is 16, expected an amount"),
        (("--model", "b", "--length", 5, "--kv-bits", 4, "--max-kv-size", 9), "--kv-bits"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line(args, said):
    assert_one_error(run("info", *args), 2, said)


@pytest.fixture(scope="module")
def run_path(tmp_path_factory) -> Path:
    """A short training run."""
    path = tmp_path_factory.mktemp("run") / "run"
    every = ("--steps-per-eval", 2, "--save-every", 2)
    trained(path, *SMALL_TREES, *every, "--k", 2, "--iters", 4)
    return path


@pytest.mark.parametrize("folder", [".", "best"])
def test_a_run_shows_how_far_it_came_and_its_best_validation(run_path, folder):
    records = [json.loads(line) for line in (run_path / "training/log.jsonl").open()]
    best = min((r for r in records if "val_loss" in r), key=lambda r: r["val_loss"])
    (adapter,) = json.loads(kmerge("info", run_path / folder, "--json").out)["adapters"]
    assert adapter["training"] == {"iteration": 4, "finished": None, "best": best}
    lines = lines_of(kmerge("info", run_path / folder).out)
    assert "training 4 iterations" in lines
    assert f"val_loss {best['val_loss']:.6g}" in lines
    assert "layout documents of 32 tokens and more merge, without a chat template" in lines
    assert "data textualized-tree" in lines


def test_a_log_torn_by_a_kill_is_no_obstacle_and_a_torn_state_is_one_line(run_path, tmp_path):
    shutil.copytree(run_path, tmp_path / "run")
    with (tmp_path / "run/training/log.jsonl").open("a") as log:
        log.write('{"iteration": 5, "val_')
    assert "best validation" in run("info", tmp_path / "run").out
    (tmp_path / "run/training/state.json").write_text('{"format_version": 1')
    assert_one_error(run("info", tmp_path / "run"), 1, "state.json is not valid JSON")


def test_the_scores_of_a_converted_checkpoint_have_their_own_rows(adapter_path, tmp_path):
    shutil.copytree(adapter_path, tmp_path / "a")
    provenance = {
        "source": "x",
        "metrics": {"accuracy": 0.98379999, "stages": ["a"] * 60},
        "eval_accuracy": "left out: 70000 bytes",
        "odd\x1b[31m": "red\x1b[0m",
    }
    change_json(tmp_path / "a/merge_config.json", provenance=provenance)
    result = run("info", tmp_path / "a")
    lines = lines_of(result.out)
    start = lines.index("metrics")
    assert lines[start + 1] == "accuracy 0.9838"
    assert lines[start + 2].endswith("...")
    assert lines.index("provenance") < lines.index("source x") < start
    assert "eval_accuracy left out: 70000 bytes" in lines
    assert "\x1b" not in result.out


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
    note, said = result.err.splitlines()
    assert note.endswith("copies of the base's tensors: base_model.model.lm_head.base_layer.weight")
    assert said == f"{tmp_path}/a: K = 4, D = 64, 50 tensors, 0.9 MB, base {base_path}"
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
