"""Writes the state dict of an ``encoder.pth`` as ``torch.save`` does, without PyTorch.

Source: torch/serialization.py of PyTorch 2.13; pickle protocol 2, as in CPython's pickletools.py.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
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

# Opcodes: \x80 protocol, c global, ( mark, t tuple, ) empty tuple, R call, Q storage, u items of a
# dictionary, \x89 False, X text, J and \x8a integers of 4 and more bytes, . stop.
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write_state_dict(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """Writes a file that ``torch.load`` reads, with ``weights_only`` and ``mmap`` too.

    It holds some thousand float32, float16 or bfloat16 arrays at most, whose bits are kept; no copy
    of them is made on the way.
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
    items = [_text(n) + _tensor(str(i), a) for i, (n, a) in enumerate(tensors.items())]
    return b"\x80\2" + _ORDERED_DICT + _sequence(b"(", items, b"u.")


def _tensor(key: str, array: mx.array) -> bytes:
    """``_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward hooks)``."""
    module, _, kind = _KINDS[array.dtype].rpartition(".")
    kind = f"c{module}\n{kind}\n".encode()
    storage = (_text("storage"), kind, _text(key), _text("cpu"), _integer(array.size))
    strides = [math.prod(n or 1 for n in array.shape[i + 1 :]) for i in range(array.ndim)]
    sizes = (_sequence(b"(", map(_integer, each), b"t") for each in (array.shape, strides))
    view = (_sequence(b"(", storage, b"tQ"), _integer(0), *sizes, b"\x89", _ORDERED_DICT)
    return _sequence(b"ctorch._utils\n_rebuild_tensor_v2\n(", view, b"tR")


def _sequence(start: bytes, items: Iterable[bytes], end: bytes) -> bytes:
    return start + b"".join(items) + end


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
