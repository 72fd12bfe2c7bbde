"""Writes the state dict of an ``encoder.pth`` as ``torch.save`` does, without PyTorch.

Source: torch/serialization.py of PyTorch 2.13; pickle protocol 2, as in CPython's pickletools.py.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from kmerge_mlx.convert.torch_read import STORAGES
from kmerge_mlx.files import flush

_ALIGNMENT = 64  # bytes; torch.load(mmap=True) uses the tensors where they lie in the file
_PADDING = 0x4246  # torch's own kind of extra field
_ZIP64_FIELD = 20  # bytes that zipfile adds to the header of a large entry
_LARGE = 1 << 30  # bytes

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
    with zipfile.ZipFile(path, "w") as archive:
        _add(archive, "data.pkl", _pickled(tensors))
        _add(archive, "byteorder", b"little")
        for i, array in enumerate(tensors.values()):
            _add(archive, f"data/{i}", _bits(array))
        _add(archive, "version", b"3\n")
    flush(path)


def _bits(array: mx.array) -> memoryview:
    """The bytes of an array in its own memory, row by row; NaNs keep their bits."""
    same_width = {2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return memoryview(np.asarray(mx.contiguous(array).view(same_width)).reshape(-1)).cast("B")


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Writes one entry, stored and aligned; its header has the date of every other one."""
    info, large = zipfile.ZipInfo(f"archive/{name}"), len(data) >= _LARGE
    start = archive.fp.tell() + zipfile.sizeFileHeader + len(info.filename) + 4
    padding = -(start + _ZIP64_FIELD * large) % _ALIGNMENT
    info.extra = struct.pack("<2H", _PADDING, padding) + b"Z" * padding
    info.file_size = len(data)
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(data)


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
