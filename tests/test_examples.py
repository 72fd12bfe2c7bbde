"""Every example outside ``serving``, ``trees`` and ``bundled`` is run as its first lines say."""

from __future__ import annotations

import json
import re
import sys

import pytest

from kmerge_mlx.prompts.keep import KINDS
from tests.conftest import UPSTREAM
from tests.doc_blocks import ROOT, Sandbox, blocks

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path):
    """Runs a command line in an empty folder, and returns what it prints."""
    (tmp_path / "work").mkdir()
    sandbox = Sandbox(tmp_path / "work")

    def run(*line: object) -> str:
        done = sandbox.run(*line)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_quickstart_converts_and_answers(run, tmp_path):
    out = run(EXAMPLES / "quickstart.sh")
    assert re.search(r"merge_factor +4$", out, re.MULTILINE)
    assert out.splitlines()[-1] == "false"
    assert list((tmp_path / "work").iterdir()) == []


def test_the_python_example_reads_four_tokens_in_a_position(run):
    out = run(sys.executable, EXAMPLES / "python_api.py")
    tokens, read = map(int, re.search(r"(\d+) tokens in (\d+) positions", out).groups())
    assert read == -(-tokens // 4)


def test_fine_tuning_learns_the_day_of_unseen_notes(run, tmp_path):
    table = run(EXAMPLES / "finetune" / "run.sh", "run").splitlines()
    found = {line.split()[0]: re.search(r"([\d.]+)%", line) for line in table if "x " in line}
    assert float(found["base"][1]) == 0
    # One answer in five would be guessed; 100% was seen.
    assert float(found["K=4"][1]) >= 80
    assert table[-1] == "Friday"
    assert (tmp_path / "work" / "run" / "out" / "best" / "merge_encoder.safetensors").exists()


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


def test_the_memory_table_prints_nothing_but_its_cells(run):
    script = ROOT / "benchmarks" / "train_table.py"
    out = run(sys.executable, script, "--model", UPSTREAM / "base", "--length", 300)
    assert re.fullmatch(r"\| base \| 4 \| 300 \| 1 \| no \| \d+\.\d\d GB \|", out.splitlines()[-1])


def test_the_table_of_what_is_kept_has_a_line_for_each_kind(run, tmp_path):
    row = {"context": "One 12 two three 3.14 four five. " * 4, "prompt": "?", "completion": "A"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    script = ROOT / "benchmarks" / "keep_ratio.py"
    lines = run(sys.executable, script, "--model", UPSTREAM / "base", tmp_path).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2:5] for line in lines}
    ratio = {label: float(found[1].strip(" x")) for label, found in list(cells.items())[2:]}
    assert [*ratio] == ["nothing", *KINDS, "all"]
    assert ratio["numbers"] == ratio["all"] < ratio["nothing"] == ratio["emails"]
