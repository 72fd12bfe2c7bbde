"""Small training runs by the command line, and what they leave: shared by the tests of training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.train import dataset
from kmerge_mlx.train.checkpoint import read_log
from tests.cli_runner import Result, run
from tests.conftest import UPSTREAM

BASE = UPSTREAM / "base"
SMALL_TREES = (
    *("--task", "textualized-tree", "--stage", "small", "--num-trees", 60),
    *("--batch-size", 8, "--val-batches", 2, "--learning-rate", 1e-3),
)
HELD_OUT_TREES = 20
NO_DROPOUT = "lora_parameters: {dropout: 0}\n"

Row = dict[str, Any]


def kmerge(*args: object, **more: Any) -> Result:
    """Runs a command, with so few held-out trees that drawing them takes no time."""
    with mock.patch.object(dataset, "HELD_OUT_TREES", HELD_OUT_TREES):
        return run(*args, **more)


def train(path: Path, *options: object, model: Path = BASE, yaml: str = "", **more: Any) -> Result:
    """Runs ``kmerge-mlx train``; ``yaml`` has the settings that have no flag."""
    file: tuple[object, ...] = ()
    if yaml:
        config = path.with_suffix(".yaml")
        config.write_text(yaml)
        file = ("-c", config)
    return kmerge("train", "--model", model, "--adapter-path", path, *file, *options, **more)


def trained(path: Path, *options: object, **more: Any) -> Result:
    """Runs it, and expects it to succeed."""
    result = train(path, *options, **more)
    assert result.code == 0, result.err
    return result


def rows_of(count: int, first: int = 0) -> list[Row]:
    """Questions to which a letter of the prompt is the answer."""
    letters = "ABCDEFGH"
    return [
        {
            "prompt": f"Tree: {letters[i % 8]}{letters[i // 8 % 8]} and {i}, Child: ",
            "completion": letters[i % 8] * 2,
        }
        for i in range(first, first + count)
    ]


def write_data(
    folder: Path, train: Iterable[Row | bytes], valid: Iterable[Row | bytes] = ()
) -> Path:
    """A data folder; bytes are lines as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("valid", valid)):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        if lines:
            (folder / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


def log_of(path: Path, name: str) -> list[tuple[int, Any]]:
    """(Iteration, value) of each record that has a figure of this name."""
    records = read_log(path / "training")
    return [(record["iteration"], record[name]) for record in records if name in record]


def tensors_of(path: Path) -> dict[str, mx.array]:
    """Every tensor of an adapter folder, by the part and its name."""
    adapter, found = load_adapter(path), {}
    for part in ("tuning", "encoder", "head"):
        named = getattr(adapter, f"{part}_weights")
        found |= {f"{part}.{n}": array for n, array in named.items()}
    return found


def same(one: dict[str, mx.array], two: dict[str, mx.array], atol: float = 0.0) -> bool:
    """Whether two sets of tensors are equal."""
    assert set(one) == set(two)
    return all(mx.allclose(one[name], two[name], rtol=0, atol=atol).item() for name in one)


def state_of(path: Path) -> dict[str, Any]:
    """Where a saved run stands."""
    return json.loads((path / "training" / "state.json").read_text())["state"]
