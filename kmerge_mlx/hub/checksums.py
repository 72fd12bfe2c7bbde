"""Whether what a download left in the hub's cache is what the hub said it would be.

Owns: the hashes of cached files, which are their names; the note that a killed download leaves for
the next one; and the removal of a file that came wrong. ``huggingface_hub`` compares sizes only.

Layout (https://huggingface.co/docs/huggingface_hub/guides/manage-cache): ``blobs/`` holds a repo's
files, named by the SHA-256 of the file (LFS, Xet) or by git's SHA-1; ``snapshots/{commit}/`` links
to them by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_NOTE = "kmerge-unchecked"


@contextmanager
def checking(cache: Path, repo_folder: str) -> Iterator[list[str]]:
    """Checks the files that come into a repo's cache inside the block, whether or not it fails.

    Files that were there before are believed, but for those that a killed run did not get to check.

    Args:
        cache: The hub's cache.
        repo_folder: The repo's folder in it.

    Yields:
        A list that holds, after the block, the names of files that came wrong; they are gone from
        the cache, so that the next download fetches them again.
    """
    folder, wrong = cache / repo_folder, []
    # Beside the client's own locks: a repo that is not there leaves nothing in the cache.
    note = cache / ".locks" / repo_folder / _NOTE
    believed = _read(note)
    if believed is None:
        believed = _blobs(folder)
        _write(note, believed)
    try:
        yield wrong
    finally:
        for name in sorted(_blobs(folder) - believed):
            if not _is_right(folder / "blobs" / name):
                wrong += _remove(folder, name)
        with contextlib.suppress(OSError):
            note.unlink()
            note.parent.rmdir()


def _blobs(folder: Path) -> set[str]:
    try:
        return {path.name for path in (folder / "blobs").iterdir() if _HASH.fullmatch(path.name)}
    except OSError:
        return set()


def _read(note: Path) -> set[str] | None:
    try:
        return set(note.read_text().split())
    except (OSError, ValueError):
        return None


def _write(note: Path, names: set[str]) -> None:
    """Writes the note whole; in a cache that cannot be written, nothing will come to be checked."""
    new = note.with_name(f"{note.name}.{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        new.write_text("\n".join(sorted(names)))
        new.replace(note)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()


def _is_right(blob: Path) -> bool:
    """Whether a file's content has the hash that is its name; what cannot be read is not judged."""
    try:
        with blob.open("rb") as file:
            if len(blob.name) == 64:
                return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
            header = f"blob {blob.stat().st_size}\0".encode()
            of_git = hashlib.sha1(header, usedforsecurity=False)
            # Mirrors of the hub name a file by its SHA-1 without git's header.
            plain = hashlib.sha1(usedforsecurity=False)
            while chunk := file.read(1 << 20):
                of_git.update(chunk)
                plain.update(chunk)
            return blob.name in (of_git.hexdigest(), plain.hexdigest())
    except OSError:
        return True


def _remove(folder: Path, blob: str) -> list[str]:
    """Takes a blob out of a cache, with all that links to it; says what it was called."""
    path, names = folder / "blobs" / blob, []
    for link in (folder / "snapshots").glob("*/**/*"):
        if link.is_symlink() and link.readlink().name == blob:
            names.append(link.relative_to(folder / "snapshots").as_posix().partition("/")[2])
            link.unlink(missing_ok=True)
    # The client may share a file between repos: a link to it would bring the same bytes back.
    Path(os.path.realpath(path)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return names or [blob]
