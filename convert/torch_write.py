"""Writes a state dict as ``torch.save`` does: no torch, and the same bytes for the same tensors.

Owns the few pickle opcodes that say "an OrderedDict of tensors", and the zip records around them.
The names of dtypes are those that ``torch_pickle`` reads, the layouts of the records
``torch_zip``'s. Knows nothing of what the tensors mean.

Source: torch/serialization.py and caffe2/serialize/inline_container.cc of PyTorch 2.13; pickle
protocol 2, as in CPython's pickletools.py; PKWARE's APPNOTE 6.3.10.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from kmerge_mlx.convert.torch_pickle import STORAGES
from kmerge_mlx.convert.torch_zip import CENTRAL, END, END64, LOCAL, LOCATOR, UTF8, WIDE
from kmerge_mlx.files import flush

_ROOT = "archive"
_ALIGNMENT = 64  # bytes; torch.load(mmap=True) uses the tensors where they lie in the file
_PADDING, _ZIP64 = 0x4246, 1  # kinds of extra field: torch's own, and the wide sizes
_DATE = (1 << 5) | 1  # 1980-01-01, the first that a zip can say
_VERSION, _VERSION64 = 20, 45  # of the zip format that a reader needs
_NARROW = WIDE  # bytes; what is smaller fits the 32 bits of a record

_KINDS = {dtype: path for path, dtype in STORAGES.items() if mx.issubdtype(dtype, mx.floating)}
_OPCODES = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}


def write_state_dict(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """Writes tensors into a file that ``torch.load`` reads, with ``weights_only`` and ``mmap`` too.

    Args:
        path: The file. Beside the tensors themselves, none of their bytes are held in memory.
        tensors: Name -> float32, float16 or bfloat16 array of any shape, some thousands at most.
            Their bits are kept.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("wb") as file:
        archive = _Archive(file)
        archive.add("data.pkl", _pickled(tensors))
        archive.add("byteorder", b"little")
        for i, array in enumerate(tensors.values()):
            archive.add(f"data/{i}", _bits(array))
        archive.add("version", b"3\n")
        archive.close()
    flush(path)


def _bits(array: mx.array) -> memoryview:
    """The bytes of an array in its own memory, row by row; NaNs keep their bits."""
    same_width = {2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return memoryview(np.asarray(mx.contiguous(array).view(same_width)).reshape(-1)).cast("B")


class _Archive:
    """The entries of one zip file, stored and aligned; past 4 GiB with the zip64 records.

    Args:
        file: Empty, open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._at = 0
        self._directory: list[bytes] = []

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Writes one entry."""
        raw, size, crc = f"{_ROOT}/{name}".encode(), len(data), zlib.crc32(data)
        header, sizes = self._at, [size, size]
        local = _wide(sizes)
        local += _padding(header + LOCAL.size + len(raw) + len(local))
        central = _wide([*sizes, header])
        version = _VERSION64 if central else _VERSION
        common = (version, UTF8, 0, 0, _DATE, crc, *map(_narrow, sizes), len(raw))
        self._write(LOCAL.pack(b"PK\3\4", *common, len(local)) + raw + local)
        self._write(data)
        rest = (len(central), 0, 0, 0, 0, _narrow(header))
        self._directory.append(CENTRAL.pack(b"PK\1\2", version, *common, *rest) + raw + central)

    def close(self) -> None:
        """Writes the directory and what ends the file."""
        count, start, directory = len(self._directory), self._at, b"".join(self._directory)
        size = len(directory)
        self._write(directory)
        if start >= _NARROW:
            end = END64.pack(
                b"PK\6\6", END64.size - 12, _VERSION64, _VERSION64, 0, 0, count, count, size, start
            )
            self._write(end + LOCATOR.pack(b"PK\6\7", 0, start + size, 1))
        self._write(END.pack(b"PK\5\6", 0, 0, count, count, size, _narrow(start), 0))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._at += len(data)


def _narrow(value: int) -> int:
    return value if value < _NARROW else WIDE


def _wide(values: Sequence[int]) -> bytes:
    """The extra field for those values that are too large for a record."""
    large = [value for value in values if value >= _NARROW]
    field = struct.pack(f"<{len(large)}Q", *large)
    return struct.pack("<2H", _ZIP64, len(field)) + field if large else b""


def _padding(start: int) -> bytes:
    """An extra field at a byte of the file, so long that what follows it is aligned."""
    length = -(start + 4) % _ALIGNMENT
    return struct.pack("<2H", _PADDING, length) + b"Z" * length


def _pickled(tensors: Mapping[str, mx.array]) -> bytes:
    """The pickle of an OrderedDict; nothing in it is remembered, so every name is written out."""
    body = [_OPCODES["PROTO"] + b"\2", _ordered_dict(), _OPCODES["MARK"]]
    for i, (name, array) in enumerate(tensors.items()):
        body += [_text(name), _tensor(str(i), array)]
    return b"".join([*body, _OPCODES["SETITEMS"], _OPCODES["STOP"]])


def _tensor(key: str, array: mx.array) -> bytes:
    """``_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward hooks)``."""
    kind = (_text("storage"), _global(_KINDS[array.dtype]), _text(key), _text("cpu"))
    storage = _tuple(*kind, _integer(array.size)) + _OPCODES["BINPERSID"]
    strides = [math.prod(n or 1 for n in array.shape[i + 1 :]) for i in range(array.ndim)]
    shape, strides = (_tuple(*map(_integer, sizes)) for sizes in (array.shape, strides))
    view = (storage, _integer(0), shape, strides, _OPCODES["NEWFALSE"], _ordered_dict())
    return _global("torch._utils._rebuild_tensor_v2") + _tuple(*view) + _OPCODES["REDUCE"]


def _ordered_dict() -> bytes:
    return _global("collections.OrderedDict") + _OPCODES["EMPTY_TUPLE"] + _OPCODES["REDUCE"]


def _global(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return _OPCODES["GLOBAL"] + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return _OPCODES["MARK"] + b"".join(items) + _OPCODES["TUPLE"]


def _text(value: str) -> bytes:
    raw = value.encode()
    return _OPCODES["BINUNICODE"] + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 2**31:
        return _OPCODES["BININT"] + struct.pack("<i", value)
    return _OPCODES["LONG1"] + b"\x08" + struct.pack("<q", value)
