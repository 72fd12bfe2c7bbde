"""Reads the tensors of a PyTorch ``.pth`` file, without PyTorch and without executing anything.

A checkpoint comes from a stranger (docs/threats.md). Its pickle is walked opcode by opcode: what
``torch.save`` writes for tensors in plain containers builds stand-ins of this module, the rest is
refused, and nothing is imported or called by its name. Sizes are compared with the size of the file
before anything is allocated.

Source: torch/serialization.py and torch/_utils.py of PyTorch 2.13; CPython's pickletools.py.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from kmerge_mlx.errors import CheckpointError, first_line
from kmerge_mlx.files import MAX_DIMENSIONS, MAX_NAME_LENGTH, MAX_SIDE

_MAX_PICKLE = 1 << 20  # bytes; some 7,000 tensors
_MAX_DIRECTORY = 1 << 20  # bytes; some 12,000 entries, of which zipfile keeps 10 times as much
_MAX_OBJECTS = 1 << 18  # on the stack and in the memo; torch.save remembers about 10 a tensor
_MAX_SPAN = 2**48  # elements of a tensor, if its empty dimensions were 1 long
_MAX_COPIES = 4  # tied weights: bytes of the tensors over bytes of the file, at most

_RESAVE = "re-save it in PyTorch: torch.save(torch.load(path, weights_only=True), new_path)"
_AGAIN = f"download it again, or {_RESAVE}"
_STATE_DICT = "save the state dict in PyTorch: torch.save(model.state_dict(), new_path)"
_INNER = "save that dictionary alone: torch.save(torch.load(path, weights_only=True)[{}], new_path)"

_FOREIGN = (  # (offset, the bytes there, what the file is, what to do)
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
    (0, b"\x1f\x8b", "gzip data", "decompress it first"),
    (2, b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "the format of PyTorch before 1.6", _RESAVE),
    (0, b"\x80", "a bare pickle", _RESAVE),
)
_UNREADABLE = (  # (how a global's name starts, what was found, what to do)
    ("torch.DoubleStorage", "float64 is not supported by MLX on Metal", "save it as float32"),
    (("torch.Complex", "torch.complex"), "found complex numbers", "save two real tensors"),
    (("torch.float8_", "torch.float4_"), "found float8 or float4", "save it as float16"),
    ("torch._utils._rebuild_qtensor", "found a quantized tensor", "save its dequantize()"),
    ("torch._utils._rebuild_sparse", "found a sparse tensor", "save its to_dense()"),
    (
        "torch.distributed.",
        "found a DTensor, one rank's part of a tensor",
        "save its full_tensor()",
    ),
)
STORAGES = {
    "torch.FloatStorage": mx.float32,
    "torch.HalfStorage": mx.float16,
    "torch.BFloat16Storage": mx.bfloat16,
    "torch.BoolStorage": mx.bool_,
    "torch.ByteStorage": mx.uint8,
    "torch.CharStorage": mx.int8,
    "torch.ShortStorage": mx.int16,
    "torch.IntStorage": mx.int32,
    "torch.LongStorage": mx.int64,
    "torch.storage.UntypedStorage": mx.uint8,  # of _rebuild_tensor_v3, which adds the dtype
}
_UNSIGNED = (mx.uint16, mx.uint32, mx.uint64)
_DTYPES = {f"torch.{str(d).rpartition('.')[2]}": d for d in (*STORAGES.values(), *_UNSIGNED)}
_GLOBALS = {
    "collections.OrderedDict",
    *(f"torch._utils._rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter")),
    *STORAGES,
    *_DTYPES,
    # Of a subclass of Tensor: what comes after these says which, and is refused.
    *("torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_wrapper_subclass"),
}


class Global(str):
    """A name on the list: it stands for a class or a function, and never becomes it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Storage:
    """One run of numbers in the zip."""

    raw: bytes
    dtype: mx.Dtype


@dataclass(frozen=True, slots=True)
class Tensor:
    """A checked view of a storage, as unsigned integers: NaNs keep their bits."""

    bits: np.ndarray
    dtype: mx.Dtype


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, mx.array]:
    """Reads the flat state dict that ``torch.save`` wrote: name -> array, in the file's order.

    Bit for bit, infinite values and NaN too: float32, float16, bfloat16, bool, integers of 8 to 64
    bits. Tied weights become separate arrays. All that is wrong is one line of CheckpointError.
    """
    path = Path(path)
    name = str(path) if str(path).isprintable() else ascii(str(path))
    try:
        if path.exists() and not path.is_file():
            found = "found a directory, a device or a pipe, expected a .pth file"
            raise _bad(found, "give the file itself")
        with path.open("rb") as file:
            tensors = _read(file, path.stat().st_size)
        arrays = {each: _array(tensors.pop(each)) for each in [*tensors]}
        mx.eval(arrays)  # a view that waits keeps its source
        return arrays
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(f"{name}: cannot be read ({why}); check the path") from error


def _bad(found: str, remedy: str = _AGAIN) -> CheckpointError:
    return CheckpointError(f"{found}; {remedy}")


def _reason(error: Exception) -> str:
    return ascii(first_line(error))[1:-1][:100]


def _read(file: BinaryIO, length: int) -> dict[str, Tensor]:
    _check_format(file.read(512))
    archive, entries = _open_zip(file, length)
    if any(name == "constants.pkl" or name.startswith("code/") for name in entries):
        raise _bad("found a TorchScript program, expected a state dict", _STATE_DICT)
    if "data.pkl" not in entries:
        raise _bad("found a zip without data.pkl, expected a zip by torch.save")
    if sum(info.file_size for info in entries.values()) > length:
        raise _bad(f"found zip entries that claim more than the {length} bytes of the file")
    if (size := entries["data.pkl"].file_size) > _MAX_PICKLE:
        raise _bad(f"found a pickle of {size} bytes, expected at most {_MAX_PICKLE}", _STATE_DICT)
    order = _content(archive, entries["byteorder"]) if "byteorder" in entries else b"little"
    if order != b"little":
        raise _bad(f"found the byte order {order[:16]}, expected b'little'")

    @cache
    def read(entry: str) -> bytes:
        return _content(archive, entries[entry]) if entry in entries else b""

    try:
        tensors = _flat(_unpickle(_content(archive, entries["data.pkl"]), read))
    except (ValueError, LookupError, AttributeError) as error:  # of genops, stack, memo, container
        raise _bad(f"found a damaged pickle ({_reason(error)})") from None
    if (made := sum(tensor.bits.nbytes for tensor in tensors.values())) > _MAX_COPIES * length:
        found = f"found {made} bytes of tensors in a file of {length}"
        raise _bad(f"{found}, expected at most {_MAX_COPIES} times", "save tensor.contiguous()")
    return tensors


def _check_format(head: bytes) -> None:
    for offset, magic, kind, remedy in _FOREIGN:
        if head.startswith(magic, offset):
            raise _bad(f"found {kind}, expected a zip by torch.save", remedy)
    if not head.startswith(b"PK\3\4"):
        raise _bad(f"found {head[:16]} at the start, expected a zip by torch.save")


def _open_zip(file: BinaryIO, length: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """The zip and its entries, by their names without the root folder."""
    file.seek(max(0, length - _MAX_DIRECTORY))
    try:
        # zipfile reads a directory of any size, so it must find it in the file's tail first.
        zipfile.ZipFile(io.BytesIO(file.read()))
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise _bad(f"found a damaged or too large zip directory ({_reason(error)})") from None
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise _bad("found two zip entries of one name")
    return archive, entries


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """One whole entry, after its CRC-32 was checked."""
    # Flag bits that may be set: sizes after the data, names in UTF-8.
    if info.compress_type or info.file_size != info.compress_size or info.flag_bits & ~0x808:
        found = f"found {info.filename!a:.60} compressed or encrypted, expected it stored"
        raise _bad(found, "re-save it in PyTorch, which stores without compression or a password")
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, struct.error, EOFError, ValueError, OverflowError) as error:
        raise _bad(f"found {info.filename!a:.60} damaged ({_reason(error)})") from None


def _unpickle(data: bytes, read: Callable[[str], bytes]) -> Any:
    """Runs a pickle over stand-ins: dict, list, tuple, str, int, float, bool, None, tensors."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stack under each open mark
    memo: dict[int, Any] = {}
    for opcode, operand, _ in pickletools.genops(data):
        name, group = opcode.name, []
        if name in ("TUPLE", "APPENDS", "SETITEMS"):
            group, stack = stack, below.pop()
        elif name in ("TUPLE1", "APPEND", "TUPLE2", "SETITEM", "TUPLE3"):
            count = {"TUPLE3": 3, "TUPLE2": 2, "SETITEM": 2}.get(name, 1)
            group = [stack.pop() for _ in range(count)][::-1]
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(group))
            case "APPEND" | "APPENDS":
                stack[-1].extend(group)
            case "SETITEM" | "SETITEMS":
                stack[-1].update(_items(group))
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[operand])
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if operand is None else operand] = stack[-1]
            case "GLOBAL":
                stack.append(_global(operand.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute = stack.pop()
                stack.append(_global(f"{stack.pop()}.{attribute}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), read))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_reduce(stack.pop(), arguments))
            case "BUILD":
                stack.pop()  # the versions of a module's parts, which nothing here needs
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[name]())
            case "BINUNICODE" | "SHORT_BINUNICODE" | "LONG1" | "BINFLOAT":
                stack.append(operand)
            case "BININT" | "BININT1" | "BININT2":
                stack.append(operand)
            case _:
                found = f"found the pickle opcode {name}, expected only those of a state dict"
                raise _bad(found, _STATE_DICT)
        if len(stack) + len(below) + len(memo) > _MAX_OBJECTS:
            raise _bad(f"found a pickle that keeps over {_MAX_OBJECTS} objects")
    return stack.pop()


def _items(group: list[Any]) -> dict[Any, Any]:
    if not all(type(key) is str or _is_size(key) for key in group[::2]):
        raise _bad("found a key that is not a name")  # the hash of a deep tuple would crash
    return dict(zip(group[::2], group[1::2], strict=True))


def _global(path: str) -> Global:
    for start, found, remedy in _UNREADABLE:
        if path.startswith(start):
            raise _bad(found, remedy)
    if path not in _GLOBALS:
        raise _bad(
            f"found the global {path!a:.90}, expected only those of a state dict", _STATE_DICT
        )
    return Global(path)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # a bool is not a size


def _storage(persistent_id: Any, read: Callable[[str], bytes]) -> Storage:
    match persistent_id:
        case ("storage", Global(kind), str(key), str(), count) if kind in STORAGES:
            raw, width = read(f"data/{key}"), STORAGES[kind].size
            if not _is_size(count) or len(raw) != count * width:
                found = f"found {len(raw)} bytes in data/{key!a:.60}"
                raise _bad(f"{found}, expected {count!a:.20} numbers of {width} bytes")
            return Storage(raw, STORAGES[kind])
    raise _bad("found a persistent id that is not a storage of numbers")


def _reduce(function: Any, arguments: Any) -> dict | Tensor:
    """Stands in for a call: one of four functions, with the arguments that torch gives it."""
    if type(function) is not Global or type(arguments) is not tuple:
        raise _bad("found a call of something that is not a function", _STATE_DICT)
    match function.rpartition(".")[2], *arguments:
        case ("OrderedDict",):
            return {}
        case ("_rebuild_tensor_v2", Storage() as storage, at, shape, strides, _, _):
            return _tensor(storage, storage.dtype, at, shape, strides)
        case ("_rebuild_tensor_v3", Storage() as storage, at, shape, strides, _, _, Global(kind)):
            if kind in _DTYPES:
                return _tensor(storage, _DTYPES[kind], at, shape, strides)
        case ("_rebuild_parameter", Tensor() as tensor, _, _):
            return tensor
    raise _bad(f"found {function} with arguments other than those of a plain tensor", _STATE_DICT)


def _tensor(storage: Storage, dtype: mx.Dtype, offset: Any, shape: Any, strides: Any) -> Tensor:
    if (
        not (type(shape) is type(strides) is tuple)
        or not len(shape) == len(strides) <= MAX_DIMENSIONS
        or not all(map(_is_size, (offset, *shape, *strides)))
        or max(shape, default=0) > MAX_SIDE
        or math.prod(n or 1 for n in shape) > _MAX_SPAN
    ):
        raise _bad("found a tensor whose shape, strides and offset are not sizes that MLX can hold")
    width = dtype.size
    if 0 in shape:
        return Tensor(np.zeros(shape, f"<u{width}"), dtype)
    last = offset + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True))
    if (last + 1) * width > len(storage.raw):
        found = f"found a tensor of shape {shape} that does not fit its storage"
        raise _bad(f"{found} of {len(storage.raw)} bytes")
    # A stride is never taken along a dimension of one, and torch leaves any value there.
    steps = [s * width if n > 1 else 0 for s, n in zip(strides, shape, strict=True)]
    return Tensor(np.ndarray(shape, f"<u{width}", storage.raw, offset * width, steps), dtype)


def _flat(value: Any) -> dict[str, Tensor]:
    """Returns a dictionary of tensors as it is; refuses anything else, naming what it holds."""
    if not isinstance(value, dict):
        found = f"found an object of type {type(value).__name__}, expected a state dict"
        raise _bad(found, _STATE_DICT)
    others = [key for key, item in value.items() if type(item) is not Tensor]
    if others:
        inner = next((key for key in others if isinstance(value[key], dict)), None)
        listed = ", ".join(f"{key!a:.40} ({type(value[key]).__name__})" for key in others[:8])
        remedy = _STATE_DICT if inner is None else _INNER.format(f"{inner!a:.40}")
        raise _bad(f"found {listed} at the top level, expected only tensors", remedy)
    for key in value:
        if type(key) is not str or not key.isprintable() or len(key) > MAX_NAME_LENGTH:
            raise _bad(f"found the tensor name {key!a:.60}, expected a short printable one")
    return value


def _array(tensor: Tensor) -> mx.array:
    """Copies a view out of its storage."""
    array = mx.array(tensor.bits)
    return array != 0 if tensor.dtype == mx.bool_ else array.view(tensor.dtype)
