"""``bench --shape`` and its report of a machine, on a shape that is tiny here."""

from __future__ import annotations

import json
import platform
import re
import socket
from pathlib import Path

import pytest
import yaml

from kmerge_mlx.cli.bench import BenchSettings
from kmerge_mlx.tools import bench as benchmark
from kmerge_mlx.tools import machine, random_base
from kmerge_mlx.tools.shapes import SHAPES
from tests.cli_runner import assert_one_error, run
from tests.tiny import qwen2_config

NAME = "smollm2-135m"
QUICK = ("--shape", NAME, "--k", 2, "--k", 4, "--length", 9, "--length", 20, "-n", 2)
TEMPLATE = Path(__file__).parents[2] / ".github" / "ISSUE_TEMPLATE" / "mac-report.yml"
MAC = {
    "model": "Mac14,10",
    "processor": "Apple M2 Pro",
    "machine": "arm64",
    "system": "macOS 15.1",
    "memory_bytes": 17_179_869_184,
    "working_set_bytes": 11_453_246_122,
    "power": "Battery Power",
    "tf32": "0",
    "backend": "Metal",
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, NAME, qwen2_config())


@pytest.fixture
def in_folder(tmp_path, monkeypatch) -> Path:
    """A working directory whose path a report must not hold."""
    folder = tmp_path / "ada-lovelaces-mac"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def lines_of(text: str) -> dict[str, str]:
    """The first table of a report, by the word in front."""
    cells = re.findall(r"^\| ([\w ]+) \| (.*) \|$", text, re.MULTILINE)
    return {word: about for word, about in cells if "|" not in about}


def test_a_report_is_a_table_of_a_mac_and_json_is_what_is_printed(in_folder, monkeypatch):
    described = machine.describe_machine
    monkeypatch.setattr(machine, "describe_machine", lambda: described() | MAC)
    result = run("bench", *QUICK, "--report", in_folder / "mac.md", "--json")
    assert result.code == 0, result.err
    printed = json.loads(result.out)
    assert json.loads(Path("mac.json").read_text()) == printed
    assert {path.name for path in in_folder.iterdir()} == {"mac.md", "mac.json"}

    text = Path("mac.md").read_text()
    assert text.startswith(f"# kmerge-mlx bench: {NAME}, bfloat16, Apple M2 Pro\n")
    said = lines_of(text)
    assert said["machine"] == "Apple M2 Pro (Mac14,10, arm64)"
    assert said["system"] == "macOS 15.1"
    assert said["memory"] == "17.2 GB; Metal recommends a working set of 11.5 GB"
    assert said["power"] == "Battery Power"
    assert said["backend"] == f"Metal ({printed['machine']['device']}), MLX_ENABLE_TF32 0"
    named = ("mlx", "mlx_lm", "kmerge_mlx")
    packages = ", ".join(f"{n.replace('_', '-')} {printed['machine'][n]}" for n in named)
    assert said["versions"] == f"{packages}, Python {printed['machine']['python']}"
    assert said["model"] == f"{NAME} in bfloat16, random weights made in memory"
    assert said["merging"].startswith("untrained encoders (K = 2: ")
    assert said["merging"].endswith(" in float32), LoRA of rank 4")
    assert said["figures"].startswith(
        "median (lowest-highest) of 2 rounds after one to warm up; 128 tokens generated; "
    )

    heads, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.count("|") > 10
    )
    assert heads[3:5] == ["TTFT", "cold"]
    assert [(row[0], row[1]) for row in rows] == [
        (f"{length} tokens", k) for length in (9, 20) for k in ("1", "2", "4")
    ]
    for cells, row in zip(rows, printed["rows"], strict=True):
        cold = row["figures"]["cold_time_to_first_token"]
        assert cold > 0
        assert cells[4] in (f"{cold * 1e3:.1f} ms", f"{cold:.2f} s")
        assert row["figures"]["generation_tps"]["median"] > 0


def test_the_json_says_what_was_measured(in_folder):
    given = ("--report", "mac.md", "--lora-rank", 0, "--dtype", "float32", "-g", 130)
    result = run("bench", *QUICK, *given)
    assert result.code == 0, result.err
    assert result.out.startswith("MLX's CPU backend")
    found = json.loads(Path("mac.json").read_text())
    assert found["machine"]["dtype"] == "float32"
    assert found["settings"] == {
        "shape": NAME,
        "model": None,
        "adapter_path": None,
        "lora_rank": 0,
        "lengths": [9, 20],
        "num_trials": 2,
        "generation_tokens": 130,
        "prefill_step_size": 2048,
        "seed": 0,
        "delay": 0,
    }
    assert lines_of(Path("mac.md").read_text())["merging"].endswith(" in float32), no LoRA")


def test_a_report_names_no_user_host_or_folder(in_folder, monkeypatch):
    for name in ("USER", "LOGNAME", "HOME", "MLX_ENABLE_TF32"):
        monkeypatch.setenv(name, "/Users/lovelace")
    monkeypatch.setattr(socket, "gethostname", lambda: "lovelaces-mac.local")
    node = platform.uname()._replace(node="lovelaces-mac.local")
    monkeypatch.setattr(platform, "uname", lambda: node)
    result = run("bench", *QUICK, "--report", in_folder / "mac.md")
    assert result.code == 0, result.err
    for file in (Path("mac.md"), Path("mac.json")):
        assert "lovelace" not in file.read_text()


def test_without_a_report_a_shape_is_measured_as_a_model_is():
    result = run("bench", *QUICK, "-g", 2, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["settings"]["generation_tokens"] == 2
    # Keys and values of 2 layers of 2 heads, 32 wide, in two bytes.
    kept = [row["figures"]["kv_bytes"] for row in found["rows"]]
    assert kept == [n * 512 for n in (9, 5, 3, 20, 10, 5)]


def test_nothing_is_fetched(monkeypatch):
    monkeypatch.setattr("kmerge_mlx.base.resolve", None)
    monkeypatch.setattr("kmerge_mlx.base.read_tokenizer", None)
    assert run("bench", *QUICK, "-g", 2).code == 0


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--shape", "qwen3-4b", "--model", "x"), 2, "--shape is a base with random weights"),
        (("--shape", "qwen3-4b", "--adapter-path", "x"), 2, "leave --model and --adapter-path out"),
        (("--shape", "gpt-5"), 2, "--shape is 'gpt-5', expected one of qwen2.5-0.5b, "),
        (("--model", "x", "--dtype", "float16"), 2, "--dtype is of the weights of a --shape"),
        (
            ("--shape", NAME, "--dtype", "float64"),
            2,
            "--dtype is 'float64', expected one of float32",
        ),
        (("--model", "x", "--report", "mac.md"), 2, "--report is of a --shape (qwen2.5-0.5b, "),
        (
            ("--shape", NAME, "--report", "mac.md", "-g", 127),
            2,
            "--generation-tokens is 127, expected at least 128 for a --report",
        ),
        (("--shape", NAME, "--report", "mac.txt"), 2, "expected a name that ends with .md"),
        (("--shape", NAME, "--report", "no/mac.md"), 2, "but there is no folder no"),
        (("--shape", NAME, "--length", 40_000), 1, "the model's context of 32,768 positions"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(in_folder, monkeypatch, args, code, said):
    monkeypatch.setattr(benchmark, "measure", None)
    monkeypatch.setattr(random_base.RandomBase, "make", None)
    assert_one_error(run("bench", *args), code, said)
    assert list(in_folder.iterdir()) == []


@pytest.mark.parametrize("name", ["mac.md", "mac.json"])
def test_a_report_replaces_no_file(in_folder, monkeypatch, name):
    monkeypatch.setattr(random_base.RandomBase, "make", None)
    (in_folder / name).write_text("mine")
    result = run("bench", "--shape", NAME, "--report", "mac.md")
    assert_one_error(result, 2, f"--report: {name} is there already: name another, or remove it")
    assert (in_folder / name).read_text() == "mine"


def test_a_shape_that_does_not_fit_is_one_line(monkeypatch):
    monkeypatch.setattr(random_base.RandomBase, "make", None)
    monkeypatch.setattr(random_base, "usable_memory", lambda: 1000)
    result = run("bench", *QUICK)
    assert_one_error(result, 1, f"--shape {NAME} in bfloat16 takes 0.0 GB")


def test_the_issue_template_asks_for_the_report_by_a_command_that_exists():
    form = yaml.safe_load(TEMPLATE.read_text())
    assert form.keys() >= {"name", "description", "body"}
    (text,) = [part["attributes"]["value"] for part in form["body"] if part["type"] == "markdown"]
    (line,) = re.findall(r"^kmerge-mlx bench (.*)$", text, re.MULTILINE)
    words = line.split()
    given = dict(zip([w.removeprefix("--") for w in words[::2]], words[1::2], strict=True))
    made = BenchSettings.of(given)
    assert (made.shape, made.report, made.tokens) == ("qwen2.5-0.5b", "mac.md", 128)
    taken = [part["attributes"]["label"] for part in form["body"] if part["type"] == "textarea"]
    assert taken == ["mac.md", "mac.json"]
