"""What ``--keep`` costs: how far real prompts are compressed with nothing kept, each kind, all.

    python benchmarks/keep_ratio.py --model BASE FOLDER_WITH_TEST_JSONL ...

Only tokenizes. A row is a kind, a column a folder and K.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_lm.utils import load_tokenizer

from kmerge_mlx.data.examples import RowFormat
from kmerge_mlx.data.layout import prompt_segments
from kmerge_mlx.data.sources import load_examples
from kmerge_mlx.prompts.keep import KINDS
from kmerge_mlx.prompts.policy import Layout

FACTORS = (2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=1000, help="rows of each folder")
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model)
    names = [f"{folder.name}, K = {k}" for folder in given.folders for k in FACTORS]
    print(f"| kept | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    read = [load_examples(str(f), RowFormat(), splits=("test",))["test"] for f in given.folders]
    for label, keep in {"nothing": (), **{kind: (kind,) for kind in KINDS}, "all": KINDS}.items():
        cells = []
        for examples in read:
            layout = Layout(keep=tuple(keep))
            rows = [prompt_segments(tokenizer, e, layout) for e in examples[: given.limit]]
            tokens = sum(len(segment.ids) for row in rows for segment in row)
            for k in FACTORS:
                positions = sum(segment.positions(k) for row in rows for segment in row)
                cells.append(f"{tokens / positions:.2f}x")
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
