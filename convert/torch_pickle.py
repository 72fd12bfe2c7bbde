"""The pickle inside a PyTorch checkpoint, run over stand-ins: nothing is imported or called.

Owns the opcodes and names that ``torch.save`` writes for tensors in plain containers, refuses
every other one, and checks that each tensor is a view inside its storage. Reads no tensor data.

Memory is bounded by the pickle's size: no opcode makes more than about 50 bytes for each byte it
takes, and the stack and the memo are capped (with a list as the memo, a tiny ``LONG_BINPUT``
pickle took 4 GB).

Source: CPython's pickletools.py (protocols 2 to 5); torch/_utils.py and torch/serialization.py of
PyTorch 2.13 for the names, their arguments and the persistent ids.
"""

from __future__ import annotations

import math
import pickletools
import struct
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from kmerge_mlx.errors import CheckpointError

_MAX_PROTOCOL = 5
_MAX_MEMO = 1 << 18  # torch.save memoizes about 10 objects a tensor
_MAX_STACK = 10_000  # pickle fills dictionaries in batches of 1,000 items
_MAX_NDIM = 8
_MAX_DIM = 2**31 - 1  # MLX counts a dimension in 32 bits
_MAX_SPAN = 2**48  # elements of a tensor, were its empty dimensions 1 long

_EXPECTED = "expected only those of a state dict"
_STATE_DICT = "save only its tensors in PyTorch: torch.save(model.state_dict(), new_path)"

_DTYPES = {
    f"torch.{str(dtype).removeprefix('mlx.core.')}": dtype
    for dtype in (
        *(mx.float32, mx.float16, mx.bfloat16, mx.bool_),
        *(mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64),
    )
}
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
_GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    *STORAGES,
    *_DTYPES,
}
_UNREADABLE = (  # (how a global's name starts, what was found, what to do)
    ("torch.DoubleStorage", "float64 is not supported by MLX on Metal", "save it as float32"),
    ("torch.Complex", "found complex numbers, expected real ones", "save two real tensors"),
    ("torch.complex", "found complex numbers, expected real ones", "save two real tensors"),
    ("torch.float8_", "found float8, expected float16 or wider", "save it as float16"),
    ("torch.float4_", "found float4, expected float16 or wider", "save it as float16"),
    ("torch._utils._rebuild_qtensor", "found a quantized tensor", "save its dequantize()"),
    ("torch._utils._rebuild_sparse", "found a sparse tensor", "save its to_dense()"),
)


@dataclass(frozen=True, slots=True)
class Global:
    """A name on the list: it stands for the class or function and never becomes it."""

    path: str


@dataclass(frozen=True, slots=True)
class Storage:
    """One run of numbers in the archive: its entry ``data/<key>``, and what it should hold."""

    key: str
    dtype: mx.Dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A checked view of a storage, without overlaps; offset and strides are in elements."""

    storage: Storage
    dtype: mx.Dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


class OrderedDict(dict):
    """A ``collections.OrderedDict`` in the file: the one type that may carry ``_metadata``."""

    __slots__ = ()


_OPCODES = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}
_OPERANDS = {  # as struct formats
    **dict.fromkeys(("PROTO", "BININT1", "LONG1", "SHORT_BINUNICODE", "BINGET", "BINPUT"), "<B"),
    **dict.fromkeys(("BINUNICODE", "LONG_BINGET", "LONG_BINPUT"), "<I"),
    "BININT": "<i",
    "BININT2": "<H",
    "BINFLOAT": ">d",
    "FRAME": "<Q",
}


def load(data: bytes) -> Any:
    """Runs a pickle that ``torch.save`` wrote.

    Args:
        data: The bytes of ``data.pkl``; the caller bounds their number.

    Returns:
        The one object in it, made of dict, list, tuple, str, int, float, bool, None and the
        stand-ins of this module. It may contain itself.

    Raises:
        CheckpointError: The pickle is damaged, or holds anything else.
    """
    return _Machine(data).run()


class _Machine:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (name := _OPCODES.get(code := self._take(1), f"0x{code.hex()}")) != "STOP":
            self._step(name)
            if len(self._stack) + len(self._marks) > _MAX_STACK:
                raise CheckpointError(f"found a pickle that stacks over {_MAX_STACK} objects")
        (value,) = self._pop(1)
        if self._stack or self._marks or self._at != len(self._data):
            raise CheckpointError("found more than one object in its pickle")
        return value

    def _step(self, name: str) -> None:
        push = self._stack.append
        operand = self._number(_OPERANDS[name]) if name in _OPERANDS else 0
        match name:
            case "FRAME":
                pass
            case "PROTO" if operand <= _MAX_PROTOCOL:
                pass
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT":
                push(operand)
            case "LONG1":
                push(int.from_bytes(self._take(operand), "little", signed=True))
            case "BINUNICODE" | "SHORT_BINUNICODE":
                push(_text(self._take(operand)))
            case "BINGET" | "LONG_BINGET":
                push(self._recall(operand))
            case "BINPUT" | "LONG_BINPUT":
                self._remember(operand)
            case "MEMOIZE":
                self._remember(len(self._memo))
            case "MARK":
                self._marks.append(len(self._stack))
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(self._pop(int(name[-1]))))
            case "TUPLE":
                push(tuple(self._pop_group()))
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case _:
                self._combine(name)

    def _combine(self, name: str) -> None:
        push = self._stack.append
        match name:
            case "APPEND" | "APPENDS":
                items = self._pop(1) if name == "APPEND" else self._pop_group()
                _extend(self._top(), items)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if name == "SETITEM" else self._pop_group()
                _set_items(self._top(), items)
            case "GLOBAL":
                push(_global(self._line(), self._line()))
            case "STACK_GLOBAL":
                push(_global(*self._pop(2)))
            case "BINPERSID":
                push(_storage(*self._pop(1)))
            case "REDUCE":
                push(_reduce(*self._pop(2)))
            case "BUILD":
                (state,) = self._pop(1)
                _drop_metadata(self._top(), state)
            case _:
                raise CheckpointError(f"found the pickle opcode {name}, {_EXPECTED}", _STATE_DICT)

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            raise CheckpointError(f"found {len(taken)} bytes at the pickle's end, expected {size}")
        self._at += size
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        stop = self._data.find(b"\n", self._at)
        if stop < 0:
            raise CheckpointError("found a name without an end in its pickle")
        return _text(self._take(stop + 1 - self._at)[:-1])

    def _remember(self, index: int) -> None:
        if index >= _MAX_MEMO:
            raise CheckpointError(f"found the memo index {index}, expected under {_MAX_MEMO}")
        self._memo[index] = self._top()

    def _recall(self, index: int) -> Any:
        if index not in self._memo:
            raise CheckpointError(f"found the memo index {index}, which nothing was written to")
        return self._memo[index]

    def _top(self) -> Any:
        (top,) = self._pop(1)
        self._stack.append(top)
        return top

    def _pop(self, count: int) -> list[Any]:
        start = len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise CheckpointError("found too few objects on the pickle's stack")
        popped = self._stack[start:]
        del self._stack[start:]
        return popped

    def _pop_group(self) -> list[Any]:
        if not self._marks:
            raise CheckpointError("found the end of a group in its pickle without the start")
        return self._pop(len(self._stack) - self._marks.pop())


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"found the string {raw!a:.60}, expected UTF-8") from None


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise CheckpointError(f"found items for a {type(target).__name__}, expected a list")
    target.extend(items)


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        found = f"found {len(items)} items for an object of type {type(target).__name__}"
        raise CheckpointError(f"{found}, expected pairs for a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Large integers can be made to collide; the hash of a deep tuple overflows the stack.
        if type(key) is not str and not (_is_size(key) and key < 2**31):
            raise CheckpointError(f"found a key of type {type(key).__name__}, expected a name")
        if key in target:
            raise CheckpointError(f"found the key {key!a:.60} twice in one dictionary")
        target[key] = value


def _drop_metadata(target: Any, state: Any) -> None:
    """The versions that ``Module.state_dict`` hangs on its result: nothing here needs them."""
    if type(target) is not OrderedDict or type(state) is not dict or state.keys() - {"_metadata"}:
        found = f"found attributes of an object of type {type(target).__name__}"
        raise CheckpointError(f"{found}, expected only _metadata", _STATE_DICT)


def _global(module: Any, name: Any) -> Global:
    if type(module) is not str or type(name) is not str:
        raise CheckpointError("found a global that is not named by two strings")
    path = f"{module}.{name}"
    for start, found, remedy in _UNREADABLE:
        if path.startswith(start):
            raise CheckpointError(found, remedy)
    if path not in _GLOBALS:
        raise CheckpointError(f"found the global {path!a:.90}, {_EXPECTED}", _STATE_DICT)
    return Global(path)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # a bool is not a size


def _storage(pid: Any) -> Storage:
    match pid:
        case ("storage", Global(path), str(key), str(), count):
            if path in STORAGES and _is_size(count) and key.isdecimal() and len(key) <= 20:
                return Storage(key, STORAGES[path], count * STORAGES[path].size)
    raise CheckpointError("found a persistent id that is not a storage of numbers")


def _reduce(function: Any, args: Any) -> OrderedDict | Tensor:
    """Stands in for a call: one of four functions, with the arguments that torch gives it."""
    if type(function) is not Global or type(args) is not tuple:
        raise CheckpointError("found a call of something that is not a function", _STATE_DICT)
    match function.path.rpartition(".")[2], *args:
        case ("OrderedDict",):
            return OrderedDict()
        case ("_rebuild_tensor_v2", Storage() as storage, at, shape, strides, _, _):
            return _tensor(storage, storage.dtype, at, shape, strides)
        case ("_rebuild_tensor_v3", Storage() as storage, at, shape, strides, _, _, Global(name)):
            if name in _DTYPES:
                return _tensor(storage, _DTYPES[name], at, shape, strides)
        case ("_rebuild_parameter", Tensor() as tensor, _, _):
            return tensor
    found = f"found {function.path} with arguments other than those of a plain tensor"
    raise CheckpointError(found, _STATE_DICT)


def _tensor(storage: Storage, dtype: mx.Dtype, offset: Any, shape: Any, strides: Any) -> Tensor:
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise CheckpointError("found a tensor whose shape and strides are not two equal tuples")
    if len(shape) > _MAX_NDIM:
        raise CheckpointError(f"found {len(shape)} dimensions, expected {_MAX_NDIM} or fewer")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise CheckpointError("found a tensor whose shape, strides and offset are not all sizes")
    if max(shape, default=0) > _MAX_DIM or math.prod(n or 1 for n in shape) > _MAX_SPAN:
        raise CheckpointError(f"found the tensor shape {shape}, beyond what MLX can hold")
    tensor = Tensor(storage, dtype, offset, shape, strides)
    if tensor.nbytes:
        _check_view(tensor)
    return tensor


def _check_view(tensor: Tensor) -> None:
    """No two elements in one place, and none outside the storage."""
    reach = 0
    for stride, length in sorted(
        (s, n) for s, n in zip(tensor.strides, tensor.shape, strict=True) if n > 1
    ):
        if stride <= reach:
            found = f"found overlapping elements in a tensor of shape {tensor.shape}"
            raise CheckpointError(found, "save tensor.contiguous()")
        reach += stride * (length - 1)
    if (tensor.offset + reach + 1) * tensor.dtype.size > tensor.storage.nbytes:
        found = f"found a tensor of shape {tensor.shape} that does not fit its storage"
        raise CheckpointError(f"{found} of {tensor.storage.nbytes} bytes")
