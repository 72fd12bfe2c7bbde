"""Memory over a long training run: what is in use, and the peak, every 200 iterations.

Trains a tiny random model on textualized trees as ``kmerge-mlx train`` does,
with validations and saves, and prints MLX's active memory and peak since the last line, the
process's resident set, and how many blocks the slot table holds. Everything should be level from
the first line on: rows are of few shapes, and blocks of a batch live as long as the batch.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0 \\
        python benchmarks/train_memory.py --iters 2000
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
from measure import resident

from kmerge_mlx.model import merged_embedding
from kmerge_mlx.train.loop import Trainer
from kmerge_mlx.train.prepare import Run, prepare
from kmerge_mlx.train.settings import TrainSettings

BASE = Path(__file__).parents[1] / "tests" / "fixtures" / "upstream_tied_k4" / "base"


class Meter:
    """Measures every so many iterations."""

    def __init__(self, run: Run, every: int):
        self._run, self._every = run, every
        self.lines: list[dict[str, float]] = []

    def on_iteration(self, iteration: int) -> None:
        if iteration % self._every:
            return
        table = merged_embedding(self._run.model).table
        self.lines.append(
            {
                "iteration": iteration,
                "active_mb": mx.get_active_memory() / 1e6,
                "peak_mb": mx.get_peak_memory() / 1e6,
                "resident_mb": resident() / 1e6,
                "blocks": len(table),
            }
        )
        mx.reset_peak_memory()
        print("  ".join(f"{n} {v:,.1f}" for n, v in self.lines[-1].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BASE))
    parser.add_argument("--iters", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--stage", default="medium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainSettings.of(
            {
                "model": options.model,
                "task": "textualized-tree",
                "stage": options.stage,
                "iters": options.iters,
                "batch_size": options.batch_size,
                "adapter_path": f"{folder}/run",
                "num_trees": 20_000,
            }
        )
        run = prepare(config)
        meter = Meter(run, options.every)
        Trainer(run, [meter]).train()
    first, rest = meter.lines[0], meter.lines[1:]
    for name in ("active_mb", "peak_mb", "resident_mb"):
        most = max(line[name] for line in rest)
        change = 100 * (most / first[name] - 1) if first[name] else 0.0
        print(f"{name}: highest after the first line {change:+.2f}% of it")


if __name__ == "__main__":
    main()
