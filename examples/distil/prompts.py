"""Makes prompts without answers from trees: the tree is the context, the question stays raw."""

import json
import sys
from pathlib import Path

TASK = ", Task: Find Parent"


def main(source: Path, target: Path) -> None:
    target.mkdir()
    for split in ("train", "valid"):
        lines = []
        for row in (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            tree, asked, child = json.loads(row)["prompt"].partition(TASK)
            if asked:
                lines.append(json.dumps({"context": tree, "prompt": asked + child}) + "\n")
        (target / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
