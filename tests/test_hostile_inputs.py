"""Damaged and hostile checkpoints and adapters: an answer or one of our errors, and little memory.

Everything happens in one process of its own (``hostile_inputs_process``), so that a crash in a
library is seen, and its memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    *("src/adapter_model.safetensors", "src/adapter_config.json", "src/metrics.json"),
    *("adapter/adapter_config.json", "adapter/adapters.safetensors"),
    *("adapter/merge_config.json", "adapter/merge_encoder.safetensors"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_inputs_process", str(tmp_path_factory.mktemp("h"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_hostile_file_is_read_or_refused_with_one_clear_line(report):
    assert report["wrong"] == []


def test_every_kind_of_file_was_damaged_over_a_thousand_times(report):
    assert report["cases"].keys() == FILES
    for name, (accepted, refused) in report["cases"].items():
        assert accepted + refused > 1000, name
        assert accepted > 10, name  # the mutations are not all absurd
        if name == "src/metrics.json":
            assert refused == 0  # provenance, however damaged, never stands in the way
        else:
            assert refused > 300, name


def test_hostile_files_cost_no_more_than_their_limits(report):
    """Measured on Linux: 80 MB after importing mlx_lm, 97 after one good file, 165 at the end."""
    assert not report["torch"]
    assert report["after"] - report["imported"] < 120
