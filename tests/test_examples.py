"""Every example outside ``serving``, ``trees`` and ``bundled`` is run as its first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_runner import PLAIN_USER, command, environment
from tests.conftest import UPSTREAM
from tests.doc_blocks import ROOT, blocks

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path):
    """Runs a script with ``kmerge-mlx`` and ``python3`` of this environment on its path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, line in (("kmerge-mlx", command()), ("python3", [sys.executable])):
        (tools / name).write_text(f'#!/bin/sh\nexec {" ".join(line)} "$@"\n')
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])

    def run(*line: object, cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            [*map(str, line)],
            cwd=cwd,
            env=environment(PATH=path, PYTHONPATH=f"{ROOT}{os.pathsep}{PLAIN_USER}"),
            capture_output=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_quickstart_converts_and_answers(run, tmp_path):
    out = run(EXAMPLES / "quickstart.sh")
    assert re.search(r"merge_factor +4$", out, re.MULTILINE)
    assert out.splitlines()[-1] == "false"
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]


def test_the_python_example_reads_four_tokens_in_a_position(run):
    out = run(sys.executable, EXAMPLES / "python_api.py")
    tokens, read = map(int, re.search(r"(\d+) tokens in (\d+) positions", out).groups())
    assert read == -(-tokens // 4)


def test_fine_tuning_learns_the_day_of_unseen_notes(run, tmp_path):
    table = run(EXAMPLES / "finetune" / "run.sh", "run").splitlines()
    rows = {line.split()[0]: line.split() for line in table if "x " in line}
    assert float(rows["uncompressed"][2].rstrip("%")) == 0
    # One answer in five would be guessed; 100% was seen.
    assert float(rows["K=4"][2].rstrip("%")) >= 80
    assert table[-1] == "Friday"
    assert (tmp_path / "run" / "out" / "best" / "merge_encoder.safetensors").exists()


def test_a_long_document_is_read_once_and_asked_three_times(run):
    answers = re.findall(r"Answer: (\w*) \(right: (\w+)\)", run(EXAMPLES / "long_document.sh"))
    assert len(answers) == 3
    assert sum(said == right for said, right in answers) >= 2


def test_self_distillation_comes_nearer_to_the_base(run):
    found = re.findall(r"KL ([\d.]+) nats", run(EXAMPLES / "distil" / "run.sh"))
    before, after = map(float, found)
    assert after < before / 2


def test_the_guide_writes_the_notes_that_the_example_writes():
    code = [b.text for b in blocks(ROOT / "docs" / "guide.md") if b.language == "python"]
    assert [text.strip() for text in code] == [
        (EXAMPLES / "finetune" / "notes.py").read_text(encoding="utf-8").strip()
    ]


def test_the_memory_table_prints_nothing_but_its_cells(tmp_path):
    script = ROOT / "benchmarks" / "train_table.py"
    done = subprocess.run(
        [sys.executable, script, "--model", UPSTREAM / "base", "--length", "1500"],
        capture_output=True,
        encoding="utf-8",
        env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{PLAIN_USER}"),
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *_, cell = done.stdout.splitlines()
    assert re.fullmatch(r"\| base \| 4 \| 1,500 \| 1 \| no \| \d+\.\d\d GB \|", cell)
