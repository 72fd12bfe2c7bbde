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


@pytest.mark.slow
def test_every_hostile_file_is_read_or_refused_with_one_clear_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_inputs_process", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert report["cases"].keys() == FILES
    for name, (accepted, refused, *_) in report["cases"].items():
        assert accepted + refused > 250, name
        assert accepted > 2, name  # the mutations are not all absurd
        # Provenance, however damaged, never stands in the way.
        assert refused == 0 if name == "src/metrics.json" else refused > 75, name
    # Measured on Linux: 80 MB after importing mlx_lm, 97 after one good file, 165 at the end.
    assert not report["torch"]
    assert report["after"] - report["imported"] < 120
