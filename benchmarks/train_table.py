"""Peak memory of training, by base, length of the prompts, batch and gradient checkpointing.

    python benchmarks/random_base.py qwen05b
    python benchmarks/train_table.py --model qwen05b --length 512 --length 2048 \\
        --batch-size 1 --batch-size 4 --both

Each cell is two iterations of ``kmerge-mlx train`` in a process of its own, whose own peak is read
(MLX's figure: base, encoder, LoRA, optimizer and activations).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ANSWER = "0123456789"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="a base; may be repeated")
    parser.add_argument("--k", type=int, action="append", help="default: 4; may be repeated")
    parser.add_argument("--length", type=int, action="append", help="tokens of a prompt: 512")
    parser.add_argument("--batch-size", type=int, action="append", help="default: 1")
    parser.add_argument("--both", action="store_true", help="with --grad-checkpoint, too")
    given = parser.parse_args()
    given.k, given.length = given.k or [4], given.length or [512]
    given.batch_size = given.batch_size or [1]
    return given


def write_rows(model: str, length: int, folder: Path) -> None:
    """Prompts of that many tokens, no two alike."""
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(model), random.Random(0)
    rows = []
    for _ in range(16):
        text = " ".join("".join(rng.choices("ABCDEFGHIJ", k=2)) for _ in range(length))
        # Cut at once: its length is no reason to warn.
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)[:length]
        rows.append(json.dumps({"prompt": tokenizer.decode(ids), "completion": ANSWER}))
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")


def peak_gb(model: str, k: int, data: Path, batch: int, checkpoint: bool, out: Path) -> float:
    """The peak of two iterations, in GB."""
    line = [sys.executable, "-m", "kmerge_mlx", "train", "--model", model, "--data", str(data)]
    line += ["--k", str(k), "--iters", "2", "--steps-per-report", "2", "--val-batches", "1"]
    line += ["--batch-size", str(batch), "--adapter-path", str(out), "--save-every", "2"]
    line += ["--max-seq-length", "100000", *(["--grad-checkpoint"] if checkpoint else [])]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    timings = (out / "training" / "timing.jsonl").read_text().splitlines()
    return max(json.loads(line).get("peak_memory", 0.0) for line in timings)


def main() -> None:
    given = arguments()
    print(
        "| base | K | prompt | batch | gradient checkpointing | peak |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        cells = itertools.product(given.model, given.length, given.k, given.batch_size)
        for number, (model, length, k, batch) in enumerate(cells):
            data = Path(scratch) / f"data{number}"
            write_rows(model, length, data)
            for checkpoint in (False, True) if given.both else (False,):
                out = Path(scratch) / f"run{number}-{checkpoint}"
                peak = peak_gb(model, k, data, batch, checkpoint, out)
                how = "yes" if checkpoint else "no"
                name = Path(model).name
                print(
                    f"| {name} | {k} | {length:,} | {batch} | {how} | {peak:.2f} GB |", flush=True
                )


if __name__ == "__main__":
    main()
