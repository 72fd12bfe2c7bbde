"""Reads files that strangers made, and writes files and folders whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from kmerge_mlx.errors import KMergeError, findings, first_line

T = TypeVar("T")

# What a file may cost before it is known to be good: a byte of it takes up to 40 bytes of memory.
MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 32
MAX_HEADER_BYTES = 2 << 20
MAX_NAME_LENGTH = 500
MAX_DIMENSIONS, MAX_SIDE = 8, 2**31 - 1  # MLX wraps a longer side around, and crashes on many
_SWAPPED = "swapped"  # of a folder
PIECE_BYTES = 8 << 20  # of a file that is hashed by several threads
FLOAT_DTYPES = ("F32", "F16", "BF16")
ALL_DTYPES = (*FLOAT_DTYPES, "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64", "BOOL")


def read_json(path: Path, error: type[KMergeError]) -> Any:
    """Reads a small JSON file.

    Numbers that other JSON readers have no place for (``NaN``, ``1e999``, integers of 20 digits)
    are left as strings, so they fail wherever a number is expected, and can be written again.
    """
    try:
        if _regular_size(path, error) > MAX_JSON_BYTES:
            raise error(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: not a config file")
        data = json.loads(
            path.read_bytes(), parse_int=_integer, parse_float=_float, parse_constant=str
        )
    except OSError as e:
        raise error(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        reason = first_line(e) if isinstance(e, json.JSONDecodeError) else "unreadable"
        raise error(f"{path} is not valid JSON ({reason})") from None
    if _is_deeper(data, MAX_JSON_DEPTH):
        raise error(f"{path} is nested more than {MAX_JSON_DEPTH} deep: not a config file")
    return data


def _is_deeper(data: Any, depth: int) -> bool:
    if not isinstance(data, dict | list):
        return False
    inside = data.values() if isinstance(data, dict) else data
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in inside)


def _integer(text: str) -> int | str:
    return int(text) if len(text) < 20 else text


def _float(text: str) -> float | str:
    return value if math.isfinite(value := float(text)) else text


def check_plain(path: Path, most: int, error: type[KMergeError]) -> None:
    """Refuses a file that is larger than ``most`` bytes, a folder, and what may never end."""
    if (size := _regular_size(path, error)) > most:
        raise error(f"{path} holds {size:,} bytes, expected at most {most:,}")


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(paths: Iterable[Path], error: type[KMergeError]) -> None:
    """Refuses files of tensors that this machine's memory could never hold."""
    sizes, memory = {path: _regular_size(path, error) for path in paths}, machine_memory()
    if (size := sum(sizes.values())) > memory:
        raise error(
            f"{max(sizes, key=sizes.get)} is of {size / 1e9:,.0f} GB of tensors, expected at most "
            f"this machine's memory of {memory / 1e9:,.0f} GB"
        )


def _regular_size(path: Path, error: type[KMergeError]) -> int:
    """Bytes of a file; refuses folders, and pipes and devices, which may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise error(f"cannot read {path}: it is not a file")
    return status.st_size


def safetensors_shapes(
    path: Path, error: type[KMergeError], dtypes: Collection[str] = FLOAT_DTYPES
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, from its header, if MLX can hold them."""
    from safetensors import SafetensorError, safe_open

    try:
        _regular_size(path, error)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise error(f"{path} is not a safetensors file (its header would be {header:,} bytes)")
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except OSError as e:
        raise error(f"cannot read {path}: {e.strerror or 'unreadable'}") from None
    except SafetensorError as e:
        text = ascii(first_line(e))[1:-1][:100]
        raise error(f"{path} is torn or not a safetensors file ({text})") from None
    if problems := [p for n in shapes if (p := _header_problem(n, found[n], shapes[n], dtypes))]:
        raise error(findings(str(path), problems))
    return shapes


def _header_problem(
    name: str, dtype: str, shape: tuple[int, ...], dtypes: Collection[str]
) -> str | None:
    if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        return f"found the tensor name {name!a:.60}, expected a short printable one"
    if dtype not in dtypes:
        return f"{name} has dtype {dtype}, expected one of {', '.join(dtypes)}"
    if len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_SIDE:
        return f"{name} has {len(shape)} dimensions of up to {max(shape)}: MLX cannot hold it"
    return None


def read_safetensors(
    path: Path, error: type[KMergeError], dtypes: Collection[str] = FLOAT_DTYPES
) -> dict[str, mx.array]:
    """Reads the tensors of a safetensors file, lazily, after :func:`safetensors_shapes`."""
    safetensors_shapes(path, error, dtypes)
    check_memory([path], error)
    try:
        return dict(sorted(mx.load(str(path)).items()))
    except (RuntimeError, ValueError) as e:
        raise error(f"{path} cannot be read: {first_line(e)}") from None


def digest(path: Path) -> str:
    """SHA-256 of a file's length and of the SHA-256 of each of its pieces, hashed side by side.

    A core hashes some 1.5 GB a second; all of them together, as fast as the disk reads.
    """
    size = path.stat().st_size

    def of_piece(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(PIECE_BYTES)).digest()

    whole = hashlib.sha256(b"%d" % size)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for piece in pool.map(of_piece, range(0, size, PIECE_BYTES)):
            whole.update(piece)
    return whole.hexdigest()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes JSON with a stable layout, and flushes it to the disk."""
    text = json.dumps(data, indent=2) + "\n"
    if len(text) > MAX_JSON_BYTES:
        raise OSError(errno.EFBIG, f"{path.name} would be over {MAX_JSON_BYTES >> 20} MiB")
    path.write_text(text, encoding="utf-8")
    flush(path)


def write_safetensors(path: Path, tensors: Mapping[str, mx.array], framework: str = "mlx") -> None:
    """Writes tensors, the same bytes for the same tensors, and flushes them to the disk.

    The file names the framework that it is for: ``mlx``, or ``pt`` for PyTorch.
    """
    try:
        mx.save_safetensors(str(path), dict(sorted(tensors.items())), {"format": framework})
    except RuntimeError as e:
        size = sum(array.nbytes for array in tensors.values())
        raise write_error(e, path.parent, size) from e
    flush(path)


def write_error(error: RuntimeError, folder: Path, size: int) -> OSError:
    """The likely reason why MLX could not write ``size`` bytes into a folder."""
    if shutil.disk_usage(folder).free < size:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return OSError(errno.EIO, f"MLX could not write it ({first_line(error)})")


def flush(path: Path) -> None:
    """Makes sure that what was written to a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # macOS: fsync may leave it in the disk's own memory. Not every file system has this.
        with suppress(OSError, AttributeError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file that becomes ``path`` when the block ends without an error.

    Killed at any moment, ``path`` is what it was, or absent, or whole. What a killed run left is
    cleared by the next one. The temporary file has the suffix of ``path``.
    """
    clear_leftovers(path)
    new = _beside(path, "new")
    try:
        yield new
        flush(new)
        new.replace(path)
        flush(path.parent)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def alone(path: Path, error: type[KMergeError]) -> Iterator[None]:
    """Lets one process at a time write a path, of those that ask; raises while another one does.

    The system frees the lock, a hidden file beside the path, however its process ends.
    """
    path = Path(os.path.realpath(path))
    lock, made = path.parent / f".{path.name}.lock", [p for p in path.parents if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := _locked(lock)) is None:
            pass
    except BlockingIOError:
        raise error(f"{path} is being written by another run: wait, or name another") from None
    except OSError as e:
        raise error(f"cannot write {path}: {e.strerror}") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
        for folder in made:
            with suppress(OSError):  # it is in use by now
                folder.rmdir()


def _locked(lock: Path) -> int | None:
    """A descriptor of a lock file that is held; None if its last holder was removing it."""
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), lock.stat()):
            return descriptor
    except FileNotFoundError:
        pass
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``path``, as :func:`replacing_file`."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    new, old = _beside(path, "new"), _beside(path, "old")
    new.mkdir()
    try:
        yield new
        flush(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        flush(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def settled(path: Path, read: Callable[[], T]) -> T:
    """What ``read`` finds in a folder that :func:`replacing_folder` may replace meanwhile.

    All of it is of one version: a folder that was replaced is another one to the file system.
    """
    for _ in range(100):
        before = _version(path)
        try:
            found = read()
        except KMergeError:
            if _version(path) == before != _SWAPPED:
                raise
        else:
            if _version(path) == before:
                return found
        time.sleep(0.01)
    return read()


def _version(path: Path) -> Any:
    """What changes when a folder is replaced: None where there is none, ``_SWAPPED`` for a gap."""
    try:
        status = path.stat()
        return status.st_dev, status.st_ino, status.st_mtime_ns
    except OSError:
        path = Path(os.path.realpath(path))
        gap = any(path.parent.glob(f".{glob.escape(path.name)}.old-*"))
        return _SWAPPED if gap else None


def check_destination(
    path: str | Path,
    force: bool,
    kind: str,
    names: Collection[str],
    error: type[KMergeError],
    marker: str | None = None,
) -> None:
    """Refuses to write a folder over something, before any work is done.

    A folder that a killed run was about to replace is given back first. With ``force``, a folder of
    the same ``kind`` may be replaced: it holds the ``marker``, and no other files than ``names``,
    which may be shell patterns.
    """
    path = Path(path)
    try:
        if not path.is_symlink():
            clear_leftovers(path)
            if not path.exists():
                return
        if not force:
            raise error(f"{path} exists: choose another folder, or give `force` to replace it")
        if path.is_symlink():
            raise error(f"{path} is a symbolic link, and `force` replaces only a folder")
        if not path.is_dir() or (marker is not None and not (path / marker).is_file()):
            raise error(f"{path} is not a folder of {kind} files: `force` replaces nothing else")
        inside = sorted(child.name for child in path.iterdir())
        more = [name for name in inside if not any(fnmatch(name, own) for own in names)]
    except OSError as e:
        raise error(f"cannot write {path}: {e.strerror}") from None
    if more:
        raise error(
            f"{path} holds more than {kind} files ({', '.join(more[:8])}): move that away, "
            "`force` would delete it"
        )


def clear_leftovers(path: Path) -> None:
    """Removes what killed runs left beside a path; gives a folder back that one was replacing."""
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        return
    own = re.compile(re.escape(f".{path.name}.") + r"(new|old)-(\d+)(?:[-.].*)?", re.DOTALL)
    for child in list(path.parent.iterdir()):
        found = own.fullmatch(child.name)
        if not found or child.is_symlink() or _is_running(int(found[2])):
            continue
        if child.is_file():
            child.unlink(missing_ok=True)
        elif found[1] == "old" and not path.exists():
            child.rename(path)
        else:
            shutil.rmtree(child, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """A name beside a path that says which run it belongs to, for the next one to clear."""
    name = f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}"
    return path.with_name(name)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return pid != os.getpid()  # a container gives every run the same one
