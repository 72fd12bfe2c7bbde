"""Reads the state dict in a PyTorch ``.pth`` file: no torch, and nothing in the file is executed.

Owns the file as a whole: telling it from other formats, and its storages -> MLX arrays. Its zip is
read by ``torch_zip``, the pickle in its ``data.pkl`` by ``torch_pickle``. Knows nothing of what the
tensors mean.

A checkpoint comes from a stranger, so each layer is read against a list of what ``torch.save``
writes and the rest is refused, and a size is checked against the bytes that are there before
anything is allocated for it. A hostile file costs at most about 80 MB and ``_MAX_ALIASES`` + 1
times its own size.

Source: torch/serialization.py of PyTorch 2.13.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kmerge_mlx.convert import torch_pickle
from kmerge_mlx.convert.torch_pickle import Storage, Tensor
from kmerge_mlx.convert.torch_zip import Archive
from kmerge_mlx.errors import CheckpointError

_MAX_PICKLE = 1 << 20  # bytes; some 7,000 tensors
_MAX_TENSORS = 1 << 13
_MAX_ALIASES = 4  # tied weights: how often, on average, a stored byte may appear in the tensors

_RESAVE = "re-save it in PyTorch: torch.save(torch.load(path, weights_only=True), new_path)"
_AGAIN = f"download it again, or {_RESAVE}"
_STATE_DICT = "save the state dict in PyTorch: torch.save(model.state_dict(), new_path)"
_INNER = "save that dictionary alone: torch.save(torch.load(path, weights_only=True)[{}], new_path)"

_FOREIGN = (  # (offset, the bytes there, what the file is, what to do)
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
    (0, b"\x1f\x8b", "gzip data", "decompress it first"),
    (257, b"ustar", "a tar, perhaps by PyTorch before 0.1.10", _RESAVE),
    (2, b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "the format of PyTorch before 1.6", _RESAVE),
    (0, b"\x80", "a bare pickle", _RESAVE),
)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, mx.array]:
    """Reads the flat state dict that ``torch.save`` wrote to a file.

    Args:
        path: The file. Of its bytes, one storage at a time is held beside the arrays.

    Returns:
        Name -> array, in the file's order and bit for bit: float32, float16, bfloat16, bool, and
        integers of 8 to 64 bits. Tied weights come back as separate arrays. Values are not
        judged: they may be infinite or NaN.

    Raises:
        CheckpointError: There is no such file, or it is damaged, hostile, of another format, or
            holds anything but a flat dictionary of tensors. The message is one line.
    """
    path = Path(path)
    name = str(path) if str(path).isprintable() else ascii(str(path))
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
            raise CheckpointError(f"found {kind}, expected a .pth file", "give the file itself")
        with path.open("rb") as file:
            _check_format(file.read(512))
            return _read(Archive(file, status.st_size))
    except CheckpointError as error:
        found, remedy = (*error.args, _AGAIN)[:2]  # the layers below raise it with one or both
        raise CheckpointError(f"{name}: {found}; {remedy}") from None
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(f"{name}: cannot be read ({why}); check the path") from error


def _check_format(head: bytes) -> None:
    if head.startswith(b"PK\3\4"):
        return
    if not head:
        raise CheckpointError("found an empty file, expected a zip by torch.save")
    for offset, magic, kind, remedy in _FOREIGN:
        if head.startswith(magic, offset):
            raise CheckpointError(f"found {kind}, expected a zip by torch.save", remedy)
    raise CheckpointError(f"found {head[:16]} at the start, expected a zip by torch.save")


def _read(archive: Archive) -> dict[str, mx.array]:
    entries = archive.entries
    if any(name == "constants.pkl" or name.startswith("code/") for name in entries):
        raise CheckpointError("found a TorchScript program, expected a state dict", _STATE_DICT)
    if "data.pkl" not in entries:
        raise CheckpointError("found a zip without data.pkl, expected a zip by torch.save")
    size = entries["data.pkl"].size
    if size > _MAX_PICKLE:
        found = f"found a pickle of {size} bytes, expected {_MAX_PICKLE} or less"
        raise CheckpointError(found, _STATE_DICT)
    order = archive.read("byteorder") if "byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError(f"found the byte order {order[:16]}, expected b'little' or b'big'")
    tensors = _flat(torch_pickle.load(archive.read("data.pkl")))
    arrays = {}
    for entry, names in _users(tensors, archive).items():
        raw = archive.read(entry)
        for name in names:
            arrays[name] = _array(raw, tensors[name], ">" if order == b"big" else "<")
    mx.eval(arrays)  # a view that waits keeps its source
    return {name: arrays[name] for name in tensors}


def _flat(value: Any) -> dict[str, Tensor]:
    """Returns a dictionary of tensors as it is; refuses anything else, naming what it holds."""
    if not isinstance(value, dict):
        found = f"found an object of type {type(value).__name__}, expected a state dict"
        raise CheckpointError(found, _STATE_DICT)
    others = [key for key, item in value.items() if type(item) is not Tensor]
    if others:
        inner = next((key for key in others if isinstance(value[key], dict)), None)
        listed = ", ".join(f"{key!a:.40} ({type(value[key]).__name__})" for key in others[:8])
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        raise CheckpointError(
            f"found {listed}{more} at the top level, expected only tensors",
            _STATE_DICT if inner is None else _INNER.format(f"{inner!a:.40}"),
        )
    for key in value:
        if type(key) is not str or not key.isprintable():
            raise CheckpointError(f"found the tensor name {key!a:.60}, expected a printable string")
    if len(value) > _MAX_TENSORS:
        raise CheckpointError(f"found {len(value)} tensors, expected at most {_MAX_TENSORS}")
    return value


def _users(tensors: dict[str, Tensor], archive: Archive) -> dict[str, list[str]]:
    """Maps each entry that holds a storage to the names of its tensors, once their sizes agree."""
    users: dict[str, list[str]] = {}
    storages: dict[str, Storage] = {}
    for name, tensor in tensors.items():
        entry = f"data/{tensor.storage.key}"
        if storages.setdefault(entry, tensor.storage) != tensor.storage:
            raise CheckpointError(f"found {entry!a:.60} with two types or sizes, expected one")
        users.setdefault(entry, []).append(name)
    for entry, storage in storages.items():
        if entry not in archive.entries:
            raise CheckpointError(f"found no {entry!a:.60} in the zip, expected a storage")
        size = archive.entries[entry].size
        if size != storage.nbytes:
            expected = f"expected {storage.nbytes} for its tensors"
            raise CheckpointError(f"found {size} bytes in {entry!a:.60}, {expected}")
    made = sum(tensor.nbytes for tensor in tensors.values())
    stored = sum(storage.nbytes for storage in storages.values())
    if made > _MAX_ALIASES * stored:
        found = f"found {made} bytes of tensors over {stored} bytes of storage"
        raise CheckpointError(f"{found}, expected at most {_MAX_ALIASES} times as many")
    return users


def _array(raw: bytes, tensor: Tensor, order: str) -> mx.array:
    """Copies one view out of its storage's bytes; order is "<" or ">"."""
    if not tensor.nbytes:
        return mx.zeros(tensor.shape, tensor.dtype)
    width = tensor.dtype.size
    # A stride is never taken along a dimension of one, and torch leaves any value there.
    strides = [s * width if n > 1 else 0 for s, n in zip(tensor.strides, tensor.shape, strict=True)]
    bits = np.ndarray(tensor.shape, f"{order}u{width}", raw, tensor.offset * width, strides)
    array = mx.array(bits.astype(f"=u{width}", copy=False))  # as integers: NaNs keep their bits
    return array != 0 if tensor.dtype == mx.bool_ else array.view(tensor.dtype)
