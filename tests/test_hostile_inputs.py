"""Thousands of damaged and hostile files: an answer or one of our errors, and little memory.

    python -m tests.test_hostile_inputs FOLDER

reads each with ``read_checkpoint`` or with ``find_adapters`` and ``load_adapter``, and prints one
JSON object: how many of each kind were accepted and refused, everything that was neither, and how
much memory it took at most. A process of its own, so that a crash in a library is seen.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.damage import damaged, peak_bytes

# ---- JSON ----

DEEP = "@deep@"  # replaced in the text by nesting, which json.dumps could not write
VALUES = (
    *(None, True, -1, 1, 2**31, 2**63, 10**25, 1.5, 1e300, float("nan"), float("inf")),
    *("", "x", "\ud800", "\n", "é" * 300, [], [None], ["q_proj"], {}, {"x": {"rank": 4}}),
    *([DEEP], DEEP, {"a": DEEP}, {"rank": 2**40, "scale": 1.0}, list(range(1000))),
    # Of tensors: dtypes, shapes, places in the file.
    *("F64", "U8", "BOOL", "F8_E4M3", "F16", [0], [-1], [2**62, 4], [2**64], [1.5], [0, 2**62]),
    *([1] * 9, [1] * 100_000, [4, 0], [0, 4, 8], [2**63, 2**63], [-4, 0], [1, 5], [False, True]),
)
TEXTS = (
    *("", "null", "[]", "3", "NaN", "[" * 10_000, '{"a":' * 30_000, "9" * 5000, "1e999999"),
    *("[" * 100_000 + "]" * 100_000, '{"a":' + "9" * 4400 + "}", "\ufeff{}", '{"a":1,"a":2}'),
    *("[" + "[]," * 345_000 + "[]]", '{"peft_type":"LORA"' + ',"r":4' * 150_000 + "}"),
)


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Where every value of a JSON document is."""
    yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*at, key))


def put(document: Any, at: tuple, value: Any) -> Any:
    if not at:
        return value
    changed = inner = copy.deepcopy(document)
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return changed


def json_cases(good: bytes, draw: random.Random) -> Iterator[bytes]:
    """A wrong value at every key, keys twice, missing or new, damaged bytes."""
    document = json.loads(good)
    places = list(paths(document))
    for at in draw.sample(places, min(len(places), 80)):
        for value in draw.sample(VALUES, 5):
            depth = draw.choice((20, 60, 900, 5000))
            text = json.dumps(put(document, at, value))
            yield text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode()
    for key in document:
        rest = {k: v for k, v in document.items() if k != key}
        yield json.dumps(rest).encode()
        yield (json.dumps(rest)[:-1] + f', "{key}": null, "{key}": 3' + "}").encode()
    yield from (text.encode() for text in TEXTS)
    for _ in range(120):
        yield damaged(good, draw, len(good))


# ---- safetensors ----


def packed(header: Any, body: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def safetensors_cases(good: bytes, draw: random.Random) -> Iterator[bytes]:
    """The cases of a JSON file for the header, entries swapped and renamed, lengths, bytes."""
    size = struct.unpack("<Q", good[:8])[0]
    header, body = json.loads(good[8 : 8 + size]), good[8 + size :]
    for raw in json_cases(good[8 : 8 + size], draw):
        yield packed(raw, body)
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        other = header[draw.choice(names)]
        yield packed(header | {name: other}, body)
        yield packed(header | {name: header[name] | {"shape": other["shape"]}}, body)
        for new in ("", "a\x1b[2J", "x" * 501, f"{name}\0", f"{name}.weight", "lm_head"):
            yield packed({new if n == name else n: entry for n, entry in header.items()}, body)
    for length in (0, 1, 7, 2**31, 2**62, 2**63, 2**64 - 1):
        yield packed(header, body, length)
    for metadata in (None, 3, {"a": 1}, {"a": "b" * 10**6}):
        yield packed(header | {"__metadata__": metadata}, body)
    for count, name in ((32_000, b"%d"), (3_500, b"%d." + b"a." * 235 + b"q_proj.lora_a")):
        entry = b'"' + name + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        yield packed(b"{" + b",".join(entry % i for i in range(count)) + b"}", b"")
    yield packed(b" " * (4 << 20), b"")
    for _ in range(120):
        yield damaged(good, draw, 8 + size)


# ---- running them ----


def main(folder: Path) -> dict[str, Any]:
    import mlx.core as mx

    from kmerge_mlx.adapters.folder import find_adapters, load_adapter
    from kmerge_mlx.convert.checkpoint import convert_checkpoint, read_checkpoint
    from kmerge_mlx.errors import KMergeError
    from tests.checkpoints import make

    source = make(k=2, d=4, vocab_size=12, seed=1).write(folder / "src")
    convert_checkpoint(str(source), folder / "adapter")

    def checkpoint() -> None:
        read_checkpoint(source, None, None, "src")

    def adapter() -> None:
        for found in find_adapters(folder / "adapter").values():
            loaded = load_adapter(found)
            mx.eval(loaded.encoder_weights, loaded.tuning_weights, loaded.head_weights)

    plans: tuple[tuple[str, Callable[[], None], Callable], ...] = (
        ("src/adapter_model.safetensors", checkpoint, safetensors_cases),
        ("src/adapter_config.json", checkpoint, json_cases),
        ("src/metrics.json", checkpoint, json_cases),
        ("adapter/merge_config.json", adapter, json_cases),
        ("adapter/adapter_config.json", adapter, json_cases),
        ("adapter/adapters.safetensors", adapter, safetensors_cases),
        ("adapter/merge_encoder.safetensors", adapter, safetensors_cases),
    )
    # Enough keys that every option of a metrics file is one among many.
    (source / "metrics.json").write_text(json.dumps({f"m{i}": [i, {"x": None}] for i in range(6)}))
    for _, read, _ in plans:
        read()
    report: dict[str, Any] = {"before": peak_bytes(), "wrong": [], "cases": {}}
    for name, read, cases in plans:
        path, counts = folder / name, [0, 0]
        good, before = path.read_bytes(), sorted(folder.rglob("*"))
        for number, data in enumerate(cases(good, random.Random(path.name))):
            path.write_bytes(data)
            try:
                read()
                counts[0] += 1
            except KMergeError as error:
                counts[1] += 1
                first = str(error).splitlines()[0] if str(error) else ""
                if not first.strip() or not first.isprintable():
                    report["wrong"].append(f"{name} {number}: says {first!a:.200}")
            except Exception as error:
                report["wrong"].append(f"{name} {number}: {type(error).__name__} {error}"[:400])
        path.write_bytes(good)
        if sorted(folder.rglob("*")) != before:
            report["wrong"].append(f"{name}: files were written or removed")
        report["cases"][name] = counts
    return report | {"after": peak_bytes()}


@pytest.mark.slow
def test_every_hostile_file_is_read_or_refused_with_one_clear_line(tmp_path):
    args = [sys.executable, "-m", "tests.test_hostile_inputs", str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(args, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert len(report["cases"]) == 7
    for name, (accepted, refused) in report["cases"].items():
        assert accepted > 2, name  # the mutations are not all absurd
        # Provenance, however damaged, never stands in the way.
        assert refused == 0 if name == "src/metrics.json" else refused > 75, name
    assert report["after"] - report["before"] < 120e6


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
