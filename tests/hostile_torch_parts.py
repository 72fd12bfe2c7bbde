"""Parts of ``.pth`` files, made by hand: zip records and pickle opcodes, written byte by byte.

Nothing here uses the reader under test, torch, or ``zipfile``: each part can lie.
"""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

DATA = struct.pack("<4f", 1, 2, 3, 4)


@dataclass
class Record:
    """One zip entry; every field but the first two is a lie when it is set.

    With ``header`` it is only in the directory, and says that it starts at that offset.
    """

    name: str | bytes
    data: bytes
    crc: int | None = None
    size: int | None = None
    flags: int = 0
    method: int = 0
    packed: int | None = None
    local_name: str | None = None
    header: int | None = None
    extra: bytes = b""


def pack(records: Iterable[Record]) -> bytes:
    """Writes a zip file."""
    body, directory, total = bytearray(), bytearray(), 0
    for total, record in enumerate(records, 1):  # noqa: B007 (used after the loop)
        name = record.name.encode() if isinstance(record.name, str) else record.name
        size = len(record.data) if record.size is None else record.size
        packed = size if record.packed is None else record.packed
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        header = len(body) if record.header is None else record.header
        local_name = name if record.local_name is None else record.local_name.encode()
        fields = (0, record.flags, record.method, 0, 0, crc, packed, size)
        if record.header is None:
            body += struct.pack("<4s5H3L2H", b"PK\3\4", *fields, len(local_name), 0)
            body += local_name + record.data
        directory += struct.pack("<4s6H3L", b"PK\1\2", 0, *fields)
        directory += struct.pack("<5H2L", len(name), len(record.extra), 0, 0, 0, 0, header)
        directory += name + record.extra
    counts = (0, 0, total & 0xFFFF, total & 0xFFFF)
    end = struct.pack("<4s4H2LH", b"PK\5\6", *counts, len(directory), len(body), 0)
    return bytes(body + directory + end)


def checkpoint(pickled: bytes) -> bytes:
    """A file as ``torch.save`` lays it out, around any pickle."""
    first = [Record("archive/data.pkl", pickled), Record("archive/version", b"3\n")]
    return pack([*first, Record("archive/data/0", DATA)])


def with_entry(**lies) -> bytes:
    """A good checkpoint whose storage entry lies about itself."""
    record = Record("archive/data/0", DATA)
    for name, value in lies.items():
        setattr(record, name, value)
    return pack([Record("archive/data.pkl", state()), record])


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def number(value: int | float | bool | None) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def tuple_of(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def numbers(values: Iterable) -> bytes:
    return tuple_of(*map(number, values))


def name(path: str) -> bytes:
    module, _, attribute = path.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def call(path: str, *args: bytes) -> bytes:
    return name(path) + tuple_of(*args) + pickle.REDUCE


HOOKS = call("collections.OrderedDict")


def storage(kind: str = "torch.FloatStorage", key: bytes = text("0"), count: object = 4) -> bytes:
    size = count if isinstance(count, bytes) else number(count)
    return tuple_of(text("storage"), name(kind), key, text("cpu"), size) + pickle.BINPERSID


def tensor(offset=0, shape=(4,), strides=(1,), store: bytes | None = None, *more: bytes) -> bytes:
    view = (number(offset), numbers(shape), numbers(strides))
    store = storage() if store is None else store
    return call("torch._utils._rebuild_tensor_v2", store, *view, number(False), HOOKS, *more)


def state(*pairs: bytes) -> bytes:
    """A whole pickle: an OrderedDict of key, value, key, value, ..."""
    pairs = pairs or (text("w"), tensor())
    return b"\x80\x02" + HOOKS + pickle.MARK + b"".join(pairs) + pickle.SETITEMS + pickle.STOP


def view(*args) -> bytes:
    """A whole pickle of one tensor, made with the arguments of :func:`tensor`."""
    return state(text("w"), tensor(*args))


def proto(body: bytes) -> bytes:
    return b"\x80\x02" + body + pickle.STOP
