"""Reads mutated and hostile .pth files in a process of its own, and reports what that cost.

Run by test_torch_read.py: ``python -m tests.hostile_torch_process SEEDS SCRATCH``. SEEDS holds good
small files that torch wrote. Prints one JSON object; the mutated files that could still be read are
left in SCRATCH for a comparison with torch.
"""

from __future__ import annotations

import codecs
import io
import json
import pickletools
import random
import sys
import zipfile
from pathlib import Path

import mlx.core as mx

from kmerge_mlx.convert.torch_read import read_state_dict
from kmerge_mlx.errors import CheckpointError
from tests.damage import damaged, peak_bytes
from tests.hostile_torch_files import hostile_files
from tests.hostile_torch_parts import Record, pack

MUTATIONS = 1_500
OPCODES = b"".join(op.code.encode("latin-1") for op in pickletools.opcodes)

watching = ""  # the file being read
events: set[str] = set()


def audit(event: str, args: tuple) -> None:
    """Notes whatever a read does to the world, except opening the one file to read it."""
    opens_it = event == "open" and args[:2] == (watching, "r")
    if watching and not opens_it and event != "builtins.id":
        events.add(f"{event} {args!a:.100}")


def read(path: Path, content: bytes) -> str:
    """Returns the error's message, or nothing when the file could be read."""
    global watching
    path.write_bytes(content)
    try:
        watching = str(path)
        arrays = read_state_dict(path)
        mx.eval(arrays)
    except CheckpointError as error:
        if not str(error).isprintable():
            raise
        return str(error)
    finally:
        watching = ""
    assert all(type(name) is str for name in arrays)
    assert sum(array.nbytes for array in arrays.values()) <= 4 * len(content)
    return ""


class Seed:
    """A good file, and where its parts are."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            self.entries = {info.filename: archive.read(info) for info in archive.infolist()}
        (self.pickle_name,) = (name for name in self.entries if name.endswith("/data.pkl"))
        self.pickle = self.entries[self.pickle_name]
        self.starts = [at for _, _, at in pickletools.genops(self.pickle)]

    def with_pickle(self, pickled: bytes) -> bytes:
        """The file with another pickle, whose CRC-32 and sizes are right."""
        entries = self.entries | {self.pickle_name: pickled}
        return pack(Record(name, data) for name, data in entries.items())


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three places of a file damaged."""
    for _ in range(rng.randint(1, 3)):
        data = damaged(data, rng) if data else data
    return data


def mutated_opcodes(rng: random.Random, seed: Seed) -> bytes:
    """One to three whole opcodes swapped for others, dropped or repeated elsewhere."""
    out = bytearray(seed.pickle)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(seed.starts) - 1)
        at, stop, to = *seed.starts[i : i + 2], rng.choice(seed.starts)
        match rng.choice(("opcode", "opcode", "drop", "move")):
            case "opcode":
                out[at : at + 1] = rng.choice(OPCODES).to_bytes()
            case "drop":
                del out[at:stop]
            case _:
                out[to:to] = out[at:stop]
    return bytes(out)


def mutation(rng: random.Random, seeds: list[Seed]) -> bytes:
    seed = rng.choice(seeds)
    match rng.choice(("file", "file", "pickle", "pickle", "opcodes")):
        case "file":
            return mutated_bytes(rng, seed.raw)
        case "pickle":
            return seed.with_pickle(mutated_bytes(rng, seed.pickle))
        case _:
            return seed.with_pickle(mutated_opcodes(rng, seed))


def main(seed_folder: Path, scratch: Path) -> None:
    seeds = [Seed(path.read_bytes()) for path in sorted(seed_folder.iterdir())]
    path = scratch / "file.pth"
    for seed in seeds:  # also imports whatever is imported late
        assert not read(path, seed.raw)
        assert not read(path, seed.with_pickle(seed.pickle))
    for codec in ("raw_unicode_escape", "cp437"):  # of pickletools and zipfile
        codecs.lookup(codec)
    sys.addaudithook(audit)
    taken = [name for name, content in hostile_files() if not read(path, content)]
    rng, kept = random.Random(20_260_415), 0
    for i in range(MUTATIONS):
        if not read(path, mutation(rng, seeds)):
            kept += 1
            path.rename(scratch / f"read-{i}.pth")
    counts = {"taken": taken, "read": kept, "refused": MUTATIONS - kept}
    print(json.dumps(counts | {"peak_bytes": peak_bytes(), "events": sorted(events)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
