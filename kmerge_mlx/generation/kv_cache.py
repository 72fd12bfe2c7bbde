"""Reads mlx-lm's KV caches from a file that a stranger may have made, and makes them bytes.

The model says which caches it has, and of which shapes. The file may only fill them, so mlx-lm's
own reader, which builds whatever a file names, is not used.

Source: ``mlx_lm.models.cache`` (the state of each kind; ``save_prompt_cache`` for the names).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import cache as host

from kmerge_mlx.errors import PromptError, findings, first_line

KEEP = 4
"""Positions that a cache of ``max_kv_size`` never forgets: ``make_prompt_cache``'s number."""


_NOTHING = np.zeros(0, np.uint8)
_CODES = {"float": "F", "bfloat": "BF", "int": "I", "uint": "U"}
"""Dtypes as safetensors spells them, before the number of bits."""


class Part(NamedTuple):
    """An entry of what KV caches hold: bytes that a thread without MLX may hash and write."""

    name: str
    label: str  # what the digest reads before the bytes
    kind: str | None  # mlx-lm's word for what is not an array
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray  # uint8; a view of the array's own memory, which it keeps alive


def parts(states: Sequence[Any]) -> Iterator[Part]:
    """What caches hold, given by their states; each part is evaluated as it is asked for."""
    for name, value in tree_flatten(list(states)):
        kind, label, array = None, f"{name} {value}", value
        if isinstance(value, mx.array):
            label = f"{name} {value.dtype} {value.shape}" if value.size else ""
        elif value is None:
            kind, array = "none", mx.array([])
        elif isinstance(value, str):
            kind, array = "string", mx.array([ord(character) for character in value])
        else:
            kind, array = "scalar", mx.array(value)
        data = np.array(array.flatten().view(mx.uint8), copy=False) if array.size else _NOTHING
        dtype = str(array.dtype).rpartition(".")[2]
        word = dtype.rstrip("0123456789")
        code = _CODES[word] + dtype.removeprefix(word) if word in _CODES else "BOOL"
        yield Part(name, label, kind, code, array.shape, data)


def digest(found: Iterable[Part]) -> str:
    """SHA-256 of everything that KV caches hold."""
    whole = hashlib.sha256()
    for part in found:
        whole.update(part.label.encode())
        if part.kind is None:
            whole.update(part.data)
    return whole.hexdigest()


def write(
    file: BinaryIO, kinds: Sequence[str], found: Sequence[Part], metadata: Mapping[str, str]
) -> Iterator[None]:
    """Writes parts of caches of these kinds as ``save_prompt_cache`` would, a part a step.

    Unlike it, it never calls MLX, so that any thread may.
    """
    scalars = ["", *((part.name, part.kind) for part in found if part.kind is not None)]
    header: dict[str, Any] = {
        "__metadata__": dict(tree_flatten([dict(metadata), list(kinds), scalars]))
    }
    end = 0
    for part in found:
        begin, end = end, end + len(part.data)
        header[part.name] = {
            "dtype": part.dtype,
            "shape": part.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers stay aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for part in found:
        file.write(part.data)
        yield


def compact(layer: Any) -> Any:
    """The state of a cache without room for further positions, and in order; not evaluated.

    What was trimmed, or went round in a ring, is as if the rest had been read alone.
    """
    if isinstance(layer, host.CacheList):
        return [(compact(inner), type(inner).__name__) for inner in layer.caches]
    if not hasattr(layer, "offset") or layer.empty():
        return layer.state
    held = layer.keys, layer.values
    if isinstance(layer, host.RotatingKVCache):
        keys, values = (layer._temporal_order(array) for array in held)
        more = max(0, keys.shape[2] - layer.max_size)
        keys, values = layer._trim(more, keys), layer._trim(more, values)
        return keys, values, *layer.state[2:5], keys.shape[2]
    length = layer.offset - getattr(layer, "start_position", 0)
    return *tree_map(lambda array: array[..., :length, :], held), *layer.state[2:]


def have_read(cache: Sequence[Any], positions: int) -> bool:
    """Whether so many positions were read into caches."""
    grown = [each for _, each in _layers(cache) if hasattr(each, "offset") and not each.empty()]
    return all(each.offset == positions for each in grown)


def read(path: Path, model: nn.Module, positions: int) -> list[Any]:
    """The KV caches of a file, evaluated, if a model has such after reading so many positions.

    Raises:
        PromptError: Layers are missing or not the model's, their arrays have another dtype or
            shape, hold what is not a number, or do not hold that many positions.
    """
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        cache = _template(model, arrays, metadata)
        problems = _kinds(cache, metadata)
        if not problems:
            problems = [*_fill(cache, arrays, positions)]
        # The kinds and shapes are right by now, so that memory is bounded by the positions.
        floats = [a for a in arrays.values() if mx.issubdtype(a.dtype, mx.floating)]
        if not problems and not mx.all(mx.stack([mx.isfinite(a).all() for a in floats])).item():
            problems = ["it holds what is not a number"]
        if not problems:
            mx.eval([each.state for each in cache])
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise PromptError(f"{path} is not a prompt cache: {first_line(error)}") from error
    if problems:
        raise PromptError(findings(f"{path} is not a cache of this model", problems[:8]))
    return cache


def _template(
    model: nn.Module, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]
) -> list[Any]:
    """The model's caches after one position, of the file's kinds, unevaluated."""
    cache = host.make_prompt_cache(model)
    for i, layer in enumerate(cache):
        if type(layer) is host.KVCache and metadata.get(f"1.{i}") == "RotatingKVCache":
            cache[i] = host.RotatingKVCache(_number(arrays.get(f"{i}.4")), KEEP)
    model(mx.array([[0]]), cache=cache)
    for i, layer in enumerate(cache):
        if type(layer) is host.KVCache and metadata.get(f"1.{i}") == "QuantizedKVCache":
            cache[i] = layer.to_quantized(*(_number(arrays.get(f"{i}.{at}")) for at in (3, 4)))
    return cache


def _number(array: mx.array | None) -> int:
    """A whole number as mlx-lm stores it, or -1, which fits nowhere."""
    fits = array is not None and array.shape == () and mx.issubdtype(array.dtype, mx.integer)
    return array.item() if fits else -1


def _kinds(cache: Sequence[Any], metadata: Mapping[str, str]) -> list[str]:
    """Layers that are missing, too many or of another kind."""
    found = {name: kind for name, kind in metadata.items() if name.startswith("1.")}
    wanted = {f"1.{i}": type(layer).__name__ for i, layer in enumerate(cache)}
    if len(found) != len(wanted):
        return [f"it has {len(found)} layers, the model has {len(wanted)}"]
    wrong = [name for name, kind in wanted.items() if found.get(name) != kind]
    return [f"layer {name[2:]} is not of the kind {wanted[name]}" for name in wrong]


def _fill(cache: Sequence[Any], arrays: Mapping[str, mx.array], positions: int) -> Iterator[str]:
    """Puts a file's arrays into the caches; yields what does not fit."""
    layers = [*_layers(cache)]
    wanted = {at + name for at, layer in layers for name, _ in tree_flatten(layer.state)}
    # A list of caches names their kinds, too, which the model knows.
    wanted |= {f"{at[:-3]}.1" for at, _ in layers if at.endswith(".0.")}
    if wanted != arrays.keys():
        missing, more = len(wanted - arrays.keys()), len(arrays.keys() - wanted)
        yield f"{missing} of its arrays are missing, {more} belong to nothing"
        return
    for at, layer in layers:
        grows, state = hasattr(layer, "offset"), []
        for name, like in tree_flatten(layer.state):
            value = array = arrays[at + name]
            if isinstance(like, mx.array):
                fits = array.dtype == like.dtype and _sides(array, grows) == _sides(like, grows)
            elif like is None:
                fits, value = array.size == 0, None
            else:
                value = _number(array)
                fits = value >= 0
            if not fits:
                yield f"{at}{name} is {array.dtype} of shape {array.shape}"
                return
            state.append((name, value))
        sizes = {name: getattr(layer, name, None) for name in _SIZES}
        layer.state = tree_unflatten(state)
        if not _holds(layer, positions) or any(getattr(layer, n, None) != sizes[n] for n in sizes):
            yield f"layer {at[:-1]} does not hold {positions:,} positions"


_SIZES = ("keep", "max_size", "chunk_size", "group_size", "bits")


def _layers(cache: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The caches that hold arrays, and the beginning of the names of theirs."""
    for i, layer in enumerate(cache):
        if isinstance(layer, host.CacheList):
            for j, inner in enumerate(layer.caches):
                yield f"{i}.{j}.0.", inner
        else:
            yield f"{i}.", layer


def _sides(array: mx.array, grows: bool) -> tuple[int, ...]:
    """The sides of an array, but not the number of its positions."""
    return (*array.shape[:-2], *array.shape[-1:]) if grows else array.shape


def _holds(layer: Any, positions: int) -> bool:
    """Whether a cache is as after reading so many positions, in mlx-lm's way or in order."""
    if not hasattr(layer, "offset"):
        return True
    arrays = [array for _, array in tree_flatten([layer.keys, layer.values]) if array is not None]
    if not arrays:
        return layer.offset == 0
    lengths, start = {array.shape[-2] for array in arrays}, getattr(layer, "start_position", 0)
    length, (held, *others) = positions - start, lengths
    if layer.offset != positions or others or not 0 <= start < positions:
        return False
    if isinstance(layer, host.RotatingKVCache) and positions > layer.max_size:
        return held == layer.max_size and layer._idx in (layer.keep + 1, held)
    at = getattr(layer, "_idx", length)
    # Room is made for so many positions at once.
    return at == length <= held < length + getattr(layer, "step", 1)
