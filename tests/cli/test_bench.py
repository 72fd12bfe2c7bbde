"""``kmerge-mlx bench`` as a person, and a script, meet it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.tools import bench as benchmark
from tests.cli_runner import Result, assert_one_error, environment, run
from tests.conftest import UPSTREAM
from tests.evaluations import words_of
from tests.tiny import build, qwen2_config, random_adapter, write_base

RANDOM_BASE = Path(__file__).parents[2] / "benchmarks" / "random_base.py"
QUICK = ("-n", 2, "-g", 3)
SPREADS = {"time_to_first_token", "prompt_tps", "generation_tps", "peak_bytes"}
FIGURES = SPREADS | {"cold_time_to_first_token", "kv_bytes"}
SPREAD = {"median", "min", "max", "trials"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", qwen2_config())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A folder with adapters for K = 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("adapters")
    for k in (1, 2, 3):
        save_adapter(random_adapter(build(qwen2_config()), k), folder / f"k{k}")
    return folder


def bench(*args: object, **more: object) -> Result:
    """Runs it, and expects it to succeed."""
    result = run("bench", *args, **more)
    assert result.code == 0, result.err
    return result


def measured(result: Result) -> list[tuple[int, int]]:
    """(Length, K) of each row of a JSON report."""
    return [(row["length"], row["k"]) for row in json.loads(result.out)["rows"]]


def test_json_is_one_object_with_everything_that_was_measured(base):
    asked = ("--k", 2, "--k", 4, "--length", 9, "--length", 20, *QUICK, "--seed", 7, "--json")
    result = bench("--model", base, *asked)
    assert result.out.count("\n") == 1
    report = json.loads(result.out)
    assert set(report) == {"machine", "settings", "encoders", "rows"}
    assert report["machine"].keys() >= {"backend", "device", "machine", "processor"}
    assert report["machine"].keys() >= {"dtype", "mlx", "mlx_lm", "kmerge_mlx"}
    assert report["machine"]["dtype"] == "float32"
    assert report["settings"] == {
        "model": str(base),
        "adapter_path": None,
        "lora_rank": 4,
        "lengths": [9, 20],
        "num_trials": 2,
        "generation_tokens": 3,
        "prefill_step_size": 2048,
        "seed": 7,
        "delay": 0,
    }
    assert [e["merge_factor"] for e in report["encoders"]] == [2, 4]
    assert measured(result) == [(9, 1), (9, 2), (9, 4), (20, 1), (20, 2), (20, 4)]
    assert [row["positions"] for row in report["rows"]] == [9, 5, 3, 20, 10, 5]
    for row in report["rows"]:
        compared = (row["floor"], row["speedup"], row["overhead"])
        assert [value is None for value in compared] == [row["k"] == 1] * 3
        for figures in filter(None, (row["figures"], row["floor"])):
            assert set(figures) == FIGURES
            spreads = [figures[name] for name in SPREADS]
            assert all(set(s) == SPREAD and len(s["trials"]) == 2 for s in spreads)
            assert figures["kv_bytes"] == row["positions"] * 1024


def test_the_table_says_where_it_ran_and_has_a_row_for_each_k_and_length(base):
    result = bench("--model", base, "--k", 4, "--length", 1200, "--length", 8, *QUICK)
    where, what, _, *table = result.out.split("\n\nK = 1 ")[0].splitlines()
    assert re.match(r"MLX's (CPU|Metal|CUDA) backend, .*, float32; mlx 0\.", where)
    assert what == (
        f"{base}, untrained encoders, LoRA of rank 4; median (lowest-highest) of 2 rounds after "
        "one to warm up, 3 tokens generated"
    )
    heads, *rows = (re.split(r" {2,}", line.strip()) for line in table)
    assert heads[3:7] == ["TTFT", "cold", "speed-up", "/ floor"]
    assert [(*row[:3], row[-1]) for row in rows] == [
        *(("8 tokens", "1", "8", "8.19 kB"), ("8 tokens", "4", "2", "2.05 kB")),
        *(("1,200 tokens", "1", "1,200", "1.23 MB"), ("1,200 tokens", "4", "300", "307 kB")),
    ]
    number = r"[\d,]+\.\d+"
    for row in rows:
        plain = row[1] == "1"
        assert re.fullmatch(rf"{number} (s|ms) \({number}-{number}\)", row[3])
        assert re.fullmatch(rf"{number} (s|ms)", row[4])
        assert re.fullmatch("-" if plain else rf"{number}x \({number}-{number}\)", row[5])
        assert re.fullmatch("-" if plain else rf"{number} \({number}-{number}\)", row[6])


def test_each_k_and_plain_mlx_lm_are_measured_once_asked_for_or_not(base, adapters):
    given = ("--model", base, "--length", 8, "--length", 8, *QUICK)
    table = bench(*given, "--adapter-path", adapters)
    assert f"{base}, adapter {adapters}; median" in table.out
    assert ("untrained" in table.out, table.err) == (False, "")
    given += ("--json",)
    assert measured(bench(*given, "--adapter-path", adapters)) == [(8, 1), (8, 2), (8, 3)]
    assert measured(bench(*given, "--adapter-path", adapters, "--k", 3)) == [(8, 1), (8, 3)]
    assert measured(bench(*given, "--k", 2, "--k", 1, "--k", 2)) == [(8, 1), (8, 2)]
    alone = bench(*given, "--k", 1)
    assert measured(alone) == [(8, 1)]
    assert (alone.err, json.loads(alone.out)["encoders"]) == ("", [])


def test_the_picture_names_its_axes_and_merge_factors_and_json_can_be_had_at_once(base, tmp_path):
    picture = tmp_path / "speed.svg"
    given = ("--model", base, "--k", 2, "--k", 4, "--length", 8, "--length", 64, "--json")
    result = bench(*given, *QUICK, "--plot", picture)
    assert len(measured(result)) == 6
    assert words_of(picture) >= {
        *("K = 2", "K = 4", "time to first token (s)", "KV cache of the prompt (MB)"),
        *("prompt (tokens)", "plain mlx-lm"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["speed.svg"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--length", 9000), 1, "--length 9000 is more than the model's context of 2,048"),
        (("--k", 9, "--length", 8), 1, "--k 9 is more than --length 8: a block would hold more"),
        (("--adapter-path", UPSTREAM / "base"), 1, "is a base model, not an adapter"),
        (("--plot", "x.txt"), 1, "--plot is x.txt, expected a name that ends with .png"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(tmp_path, monkeypatch, args, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "measure", None)
    result = run("bench", "--model", UPSTREAM / "base", *args)
    assert_one_error(result, code, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_random_base_of_any_size_can_be_measured(tmp_path):
    """The tokenizer is smaller than the vocabulary, as on the base of the README's figures."""
    folder = tmp_path / "base"
    options = "--dtype float16 --hidden-size 32 --num-hidden-layers 3 --intermediate-size 64"
    options += " --num-attention-heads 2 --num-key-value-heads 1 --vocab-size 5000"
    script = [sys.executable, str(RANDOM_BASE), str(folder), *options.split()]
    subprocess.run(script, env=environment(), check=True, timeout=120)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    report = json.loads(bench("--model", folder, "--length", 8, *QUICK, "--json").out)
    assert report["machine"]["dtype"] == "float16"
    # 3 layers, keys and values of one head, 16 wide, 2 bytes each.
    assert [row["figures"]["kv_bytes"] for row in report["rows"]] == [8 * 192, 2 * 192]
