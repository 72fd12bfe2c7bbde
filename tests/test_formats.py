"""What release 0.1.0 wrote is still read: an adapter, a prompt cache, a run to go on with."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.cli_runner import run
from tests.conftest import UPSTREAM

WRITTEN = UPSTREAM.parent / "v0_1_0"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of 0.1.0 and their base; the working directory."""
    shutil.copytree(WRITTEN, tmp_path / "work")
    shutil.copytree(UPSTREAM / "base", tmp_path / "work" / "base")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def answer(*more: str) -> str:
    line = ["generate", "--model", "base", "--adapter-path", "run", "-p", "What did it see?"]
    done = run(*line, "-m", "20", "--json", *more)
    assert done.code == 0, done.err
    return json.loads(done.out)["text"]


def test_an_adapter_answers_as_it_did(folder):
    assert answer("context.txt") == EXPECTED["answer"]


def test_a_prompt_cache_is_gone_on_from(folder):
    assert answer("--prompt-cache-file", "cache.safetensors") == EXPECTED["answer"]


@pytest.mark.slow
def test_a_run_is_resumed_to_the_same_losses(folder):
    done = run("train", "--adapter-path", "run", "--resume", "--iters", "8")
    assert done.code == 0, done.err
    log = [json.loads(line) for line in (folder / "run/training/log.jsonl").open()]
    found = {str(row["iteration"]): row["val_loss"] for row in log if "val_loss" in row}
    # Other processors add in another order; on one and the same the bits are equal.
    assert found == pytest.approx(EXPECTED["val_losses"], abs=1e-3)
