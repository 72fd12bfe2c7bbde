"""Thousands of damaged and hostile files in one process, which must survive them.

    python -m tests.hostile_inputs_process FOLDER

Reads each with ``read_checkpoint`` or with ``find_adapters`` and ``load_adapter``, and prints one
JSON object: how many of each kind were accepted and refused, everything that was neither, the
peak memory before and after. Torch is kept out: the package does not need it, and Transformers
would import its 180 MB.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


class NoTorch(PathFinder):
    """Finds every module but torch."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "torch" else super().find_spec(name, path, target)


def peak() -> float:
    """Most memory this process ever had, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's, before exec
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- bytes ----


def damaged(good: bytes, draw: random.Random, head: int) -> bytes:
    """Flipped, cut, extended or swapped bytes; most of it in the first ``head``."""
    data = bytearray(good)
    limit = len(data) if draw.random() < 0.2 else min(head, len(data))
    match draw.randrange(6):
        case 0 | 1:
            for _ in range(draw.choice((1, 1, 2, 8))):
                data[draw.randrange(limit)] ^= 1 << draw.randrange(8)
        case 2:
            data[draw.randrange(limit)] = draw.choice(b'{}[]",:0-9eE\\\0\xff ')
        case 3:
            del data[draw.randrange(len(data)) :]
        case 4:
            at = draw.randrange(limit)
            del data[at : at + draw.randrange(1, 9)]
        case _:
            at = draw.randrange(limit)
            data[at:at] = draw.randbytes(draw.randrange(1, 9))
    return bytes(data)


# ---- JSON ----

DEEP = "@deep@"  # replaced in the text by nesting, which json.dumps could not write
VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**25, 1.5, -0.0, 1e300, 1e-320),
    *(float("nan"), float("inf"), "", "x", "q_proj", "\ud800", "\n", "\0", "4", "é" * 300),
    *([], [1], [None], ["q_proj"], [[]], {}, {"q_proj": 1}, {"": {}}, {"x": {"rank": 4}}),
    *([DEEP], DEEP, {"a": DEEP}, {"rank": 2**40, "scale": 1.0}, list(range(1000))),
)
TEXTS = (
    *("", " ", "null", "[]", "{}", "3", '"x"', "NaN", "[" * 10_000, "{" * 500, '{"a":' * 30_000),
    *(
        "[" * 100_000 + "]" * 100_000,
        "9" * 5000,
        "1e999999",
        '{"a":' + "9" * 4400 + "}",
        "\ufeff{}",
    ),
    *("[" + "[]," * 345_000 + "[]]", "[" + '{"":0},' * 145_000 + "{}]", '{"a":1,"a":2}', "// {}"),
    *('{"peft_type":"LORA"' + ',"r":4' * 150_000 + "}", "[" + "1," * 500_000 + "1]"),
)


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Where every value of a JSON document is."""
    yield at
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from paths(inner, (*at, key))


def put(document: Any, at: tuple, value: Any) -> Any:
    if not at:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return changed


def text_of(document: Any, depth: int = 60) -> bytes:
    text = json.dumps(document).replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    return text.encode()


def json_cases(good: bytes, draw: random.Random) -> Iterator[bytes]:
    """At least 1,000: a wrong value at every key, keys twice, missing or new, damaged bytes."""
    document = json.loads(good)
    for at in paths(document):
        for value in VALUES:
            yield text_of(put(document, at, value), draw.choice((20, 60, 900, 5000)))
    for key in document:
        rest = {k: v for k, v in document.items() if k != key}
        yield text_of(rest)
        for value in draw.sample(VALUES, 3):
            doubled = json.dumps(rest)[:-1] + f', "{key}": {json.dumps(document[key])}, "{key}": '
            yield (doubled + json.dumps(value) + "}").encode()
            yield text_of(document | {draw.choice(("new", "\ud800", "\n", "")): value})
    yield from (text.encode() for text in TEXTS)
    for _ in range(700):
        yield damaged(good, draw, len(good))


# ---- safetensors ----

DTYPES = ("F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F16", "BF16", "F4", "", 3, None)
SHAPES = (
    *([], [0], [-1], [2**31], [2**62, 4], [2**63], [2**64], [1.5], ["4"], None, 3, [None], [True]),
    *([2**31, 0], [2**40, 0], [0, 2**62], [1] * 9, [1] * 3000, [1] * 100_000, [[4]], [4, 8, 1]),
)
OFFSETS = (
    *([0, 0], [4, 0], [0, 2**62], [2**63, 2**63], [-4, 0], [0], [], None, "0", [0.0, 4.0]),
    *([0, 4, 8], [2**64, 2**64 + 4], [1, 5], [False, True]),
)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(header: Any, body: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def safetensors_cases(good: bytes, draw: random.Random) -> Iterator[bytes]:
    """At least 1,000: lies in the header's every field, names, lengths, damaged bytes."""
    header, body = header_of(good)
    names = [name for name in header if name != "__metadata__"]
    for field, lies in (("dtype", DTYPES), ("shape", SHAPES), ("data_offsets", OFFSETS)):
        for lie in lies:
            for name in draw.sample(names, 3):
                yield packed(header | {name: header[name] | {field: lie}}, body)
    for name in names:
        other = draw.choice(names)
        rest = {key: value for key, value in header.items() if key != name}
        yield packed(rest, body)
        yield packed(header | {name: header[other]}, body)
        yield packed(header | {name: header[name] | {"shape": header[other]["shape"]}}, body)
        yield packed(header | {name: draw.choice((None, 3, [], {}, "x"))}, body)
        for new in ("", "\n", "a\x1b[2J", "x" * 501, f"{name}\0", other + ".weight", "lm_head"):
            yield packed(rest | {new: header[name]}, body)
    for length in (0, 1, 7, 2**31, 2**62, 2**63, 2**64 - 1, *range(0, len(good), 97)):
        yield packed(header, body, length)
    for metadata in (None, 3, [], {"a": 1}, {"a": "b" * 10**6}, {"format": "pt", "x": None}):
        yield packed(header | {"__metadata__": metadata}, body)
    for count, name in (
        (32_000, b"%d"),
        (20_000, b"model.layers.%d.q_proj.lora_A.weight"),
        (3_500, b"%d." + b"a." * 235 + b"lora_A.weight"),
        (3_500, b"%d." + b"a." * 235 + b"q_proj.lora_a"),
    ):
        entry = b'"' + name + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        yield packed(b"{" + b",".join(entry % i for i in range(count)) + b"}", b"")
    yield packed(b"[" * 100_000, b"")
    yield packed(b'{"a":' * 100_000, b"")
    yield packed(b" " * (4 << 20), b"")
    head = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(900):
        yield damaged(good, draw, head)


# ---- running them ----


def main(folder: Path) -> dict[str, Any]:
    """Runs every case; see the module's docstring for what is returned."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = NoTorch
    import mlx.core as mx
    import mlx_lm

    imported = peak()
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

    plans: tuple[tuple[Path, Callable[[], None], Callable], ...] = (
        (source / "adapter_model.safetensors", checkpoint, safetensors_cases),
        (source / "adapter_config.json", checkpoint, json_cases),
        (source / "metrics.json", checkpoint, json_cases),
        (folder / "adapter" / "merge_config.json", adapter, json_cases),
        (folder / "adapter" / "adapter_config.json", adapter, json_cases),
        (folder / "adapter" / "adapters.safetensors", adapter, safetensors_cases),
        (folder / "adapter" / "merge_encoder.safetensors", adapter, safetensors_cases),
    )
    # Enough keys that every option of a metrics file is one among many.
    (source / "metrics.json").write_text(json.dumps({f"m{i}": [i, {"x": None}] for i in range(6)}))
    report: dict[str, Any] = {"imported": imported, "before": peak(), "wrong": [], "cases": {}}
    assert mlx_lm
    for path, read, cases in plans:
        good, counts = path.read_bytes(), [0, 0]
        before = sorted(folder.rglob("*"))
        for number, data in enumerate(cases(good, random.Random(path.name))):
            path.write_bytes(data)
            try:
                read()
                counts[0] += 1
            except KMergeError as error:
                counts[1] += 1
                first = str(error).splitlines()[0] if str(error) else ""
                if not first.strip() or not first.isprintable():
                    report["wrong"].append(f"{path.name} {number}: says {first!a:.200}")
            except Exception as error:
                report["wrong"].append(
                    f"{path.name} {number}: {type(error).__name__} {error}"[:400]
                )
        path.write_bytes(good)
        read()
        if sorted(folder.rglob("*")) != before:
            report["wrong"].append(f"{path.name}: files were written or removed")
        name = f"{path.parent.name}/{path.name}"
        report["cases"][name] = counts
    return report | {"after": peak(), "torch": "torch" in sys.modules}


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
