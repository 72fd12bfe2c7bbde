"""Reading files that strangers made, and writing folders that are never torn.

Owns: bounded JSON, safetensors whose header is checked before MLX maps the data, and the atomic
replacement of a folder. Does not know what the files mean.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from kmerge_mlx.errors import KMergeError

MAX_JSON_BYTES = 16 << 20
MAX_HEADER_BYTES = 16 << 20
FLOAT_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def read_json(path: Path, error: type[KMergeError]) -> Any:
    """Reads a small JSON file.

    Raises:
        KMergeError: Of the given kind: missing, unreadable, larger than 16 MiB, or not JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: not a config file")
        return json.loads(path.read_bytes())
    except OSError as e:
        raise error(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        reason = str(e).splitlines()[0] if isinstance(e, json.JSONDecodeError) else "unreadable"
        raise error(f"{path} is not valid JSON ({reason})") from None


def safetensors_shapes(path: Path, error: type[KMergeError]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, from its checked header alone.

    Args:
        path: The file.
        error: Kind of error to raise.

    Raises:
        KMergeError: Missing, torn or not safetensors, or a tensor that is not float32, float16 or
            bfloat16.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise error(f"{path} is not a safetensors file (its header would be {header:,} bytes)")
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except OSError as e:
        raise error(f"cannot read {path}: {e.strerror or 'unreadable'}") from None
    except SafetensorError as e:
        text = str(e).splitlines()[0][:100]
        raise error(f"{path} is torn or not a safetensors file ({text})") from None
    for name, dtype in dtypes.items():
        if dtype not in FLOAT_DTYPES:
            raise error(f"{path}: {name} has dtype {dtype}, expected one of {[*FLOAT_DTYPES]}")
    return shapes


def read_safetensors(path: Path, error: type[KMergeError]) -> dict[str, mx.array]:
    """Reads the tensors of a safetensors file, lazily, after checking its header.

    Raises:
        KMergeError: As for :func:`safetensors_shapes`.
    """
    safetensors_shapes(path, error)
    try:
        return dict(sorted(mx.load(str(path)).items()))
    except RuntimeError as e:
        raise error(f"{path} cannot be read: {str(e).splitlines()[0]}") from None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes JSON with a stable layout, and flushes it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.write("\n")
        _sync(file.fileno())


def write_safetensors(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """Writes tensors, and flushes them to the disk."""
    try:
        mx.save_safetensors(str(path), dict(tensors), metadata={"format": "mlx"})
    except RuntimeError as e:  # MLX's word for a full disk
        raise OSError(errno.EIO, f"MLX could not write it ({str(e).splitlines()[0]})") from e
    with path.open("rb") as file:
        _sync(file.fileno())


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends without an error.

    Killed at any moment, ``path`` is what it was, or absent, or whole. What a killed run left
    beside it is cleared by the next run.

    Args:
        path: The folder to create, or to replace if it exists.

    Yields:
        The folder to write into.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    new = Path(tempfile.mkdtemp(prefix=_prefix(path, "new"), dir=path.parent))
    try:
        new.chmod(0o777 & ~_umask())
        yield new
        _sync_folder(new)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=_prefix(path, "old"), dir=path.parent))
            path.rename(old)
            new.rename(path)
            shutil.rmtree(old)
        else:
            new.rename(path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _prefix(path: Path, kind: str) -> str:
    return f".{path.name}.{kind}-{os.getpid()}-"


def _clear_leftovers(path: Path) -> None:
    """Removes what killed runs left; gives back a folder that one was about to replace."""
    for kind in ("old", "new"):
        for leftover in path.parent.glob(f".{path.name}.{kind}-*"):
            pid = leftover.name.removeprefix(f".{path.name}.{kind}-").split("-")[0]
            if not pid.isdigit() or _is_running(int(pid)):
                continue
            if kind == "old" and not path.exists() and any(leftover.iterdir()):
                leftover.rename(path)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
