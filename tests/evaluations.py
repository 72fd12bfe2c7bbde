"""A tiny random model with adapters, data to ask it, and evaluations of it in this process."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.evaluation.report import Report
from kmerge_mlx.evaluation.run import evaluate
from kmerge_mlx.evaluation.settings import EvaluateSettings
from tests.tiny import build, qwen2_config, random_adapter, write_base

Row = dict[str, Any]
Answers = dict[tuple[str, int], list[Row]]

QUESTIONS = 12
WORDS = ("tree", "node", "parent", "child", "answer", "the", "of", "and", "AB", "CD")
# The end of its assistant's messages is the end of an answer, and nothing follows it.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass(frozen=True)
class Folders:
    """Where the base and its adapters for K = 1, 2 and 4 are."""

    base: Path
    adapters: Path

    def settings(self, **more: Any) -> dict[str, Any]:
        """Settings of an evaluation of all of them."""
        return {"model": str(self.base), "adapter_path": str(self.adapters)} | more

    def flags(self) -> tuple[str, ...]:
        """The same on the command line."""
        return ("--model", str(self.base), "--adapter-path", str(self.adapters))


def write_folders(folder: Path, ks: Sequence[int] = (1, 2, 4), **config: Any) -> Folders:
    """Writes a random base, with changes of its config, and a random adapter for each K."""
    base = write_base(folder / "base", qwen2_config(**config))
    for k in ks:
        # mlx-lm, the oracle, has no place for a tied head's LoRA.
        adapter = random_adapter(build(qwen2_config(**config)), k, head=k > 1, seed=k)
        save_adapter(adapter, folder / "adapters" / f"k{k}")
    return Folders(base, folder / "adapters")


def questions_of(count: int, most_words: int = 25, seed: int = 0) -> list[Row]:
    """Questions of unequal lengths with unequal answers; some keep a part of the prompt raw."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    rows = []
    for number in range(count):
        row = {"prompt": text(most_words), "completion": f"{number} {text(4)}"}
        rows.append(row | {"context": text(most_words)} if number % 3 == 0 else row)
    return rows


def labelled(answers: Sequence[str]) -> list[Row]:
    """A question for each answer."""
    return [{"prompt": f"Number {i}:", "completion": a} for i, a in enumerate(answers)]


def write_data(folder: Path, rows: Sequence[Mapping[str, Any] | str], split: str = "test") -> Path:
    """A data folder; strings are lines as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def silent(label: str) -> Any:
    """In the place of progress bars."""
    return lambda done, total: None


def measured(**settings: Any) -> Report:
    """An evaluation in this process, without times unless they are asked for."""
    return evaluate(EvaluateSettings.of({"timed": 0} | settings), silent)


def words_of(picture: Path) -> set[str]:
    """Every text in an SVG: matplotlib draws letters, and names each text in a comment."""
    return set(re.findall(r"<!-- (.*?) -->", picture.read_text()))


def lines_of(file: Path) -> list[Row]:
    """The lines of a predictions file after the first."""
    return [json.loads(line) for line in file.read_bytes().splitlines()][1:]


def answers_of(file: Path) -> Answers:
    """What a predictions file holds of each method, in the order of the questions."""
    found: dict[tuple[str, int], dict[int, Row]] = {}
    for line in lines_of(file):
        found.setdefault((line["method"], line["k"]), {})[line["question"]] = line
    return {method: [of[i] for i in sorted(of)] for method, of in found.items()}
