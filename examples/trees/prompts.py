"""Takes the answers out of a data folder: what is left is prompts, for self-distillation.

kmerge-mlx data textualized-tree --stage xsmall --num-trees 12000 --out trees
python examples/trees/prompts.py trees prompts
kmerge-mlx train -c examples/trees/distill.yaml --model BASE --data prompts --adapter-path out
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    target.mkdir()
    for split in ("train", "valid"):
        rows = [json.loads(line) for line in (source / f"{split}.jsonl").open()]
        lines = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows]
        (target / f"{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
