"""Keeps the KV caches of a server's prompts in a folder, so that they survive its restart.

MLX is called in mlx-lm's generation thread alone. There an entry is evaluated, a piece between two
steps of generation, and seen through NumPy as the bytes that it has in memory. A thread that never
calls MLX hashes and writes these. They cannot change or go meanwhile: while NumPy's views refer to
an array, MLX gives its memory to nobody else; and when they are done with, they are let go of in
the generation thread. That thread alone also keeps the list of files, reads them and removes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import mlx.nn as nn
import numpy as np
from mlx_lm.models import cache as host

from kmerge_mlx.base import table_rows
from kmerge_mlx.errors import PromptError, ServeError, first_line
from kmerge_mlx.files import alone, machine_memory
from kmerge_mlx.generation import kv_cache
from kmerge_mlx.generation.prompt_cache import CacheFile, identity
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.prompts.segments import Segment, check_ids
from kmerge_mlx.serving.settings import ServeSettings
from kmerge_mlx.source import Source

WORTH = 0.1
"""A file is read if so much of it is new to memory, and written if so much is new to the folder.

Else each question about a document would write the document again.
"""

PIECE_BYTES = 64 << 20
"""What is evaluated of an entry at once."""

_KV = "--kv-bits"  # the files' name for how KV caches are quantized
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_LEFT = re.compile(r"\.[0-9a-f]{64}\.safetensors\.new-.*")
_FAULTS = (PromptError, OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError)

_log = logging.getLogger(__name__)


def _hashes(stands_for: Sequence[Hashable]) -> np.ndarray:
    return np.fromiter(map(hash, stands_for), np.int64, len(stands_for))


class Held(NamedTuple):
    """What the positions of a prompt, or of its beginning, stand for."""

    segments: list[Segment]
    k: int  # the merge factor at which those that merge are read


@dataclass(eq=False)
class _Kept:
    """A file of the folder; one without keys is of no use here, and only takes room."""

    path: Path
    size: int  # bytes
    k: int = 1  # the merge factor at which its prompt was read
    keys: np.ndarray | None = None  # of each position, a hash of what it stands for
    whole: bool = False  # only all of it can be gone on from: its state cannot be trimmed


@dataclass(eq=False)
class _New:
    """A file that is on its way."""

    file: CacheFile
    kept: _Kept
    kinds: list[str]
    left: Iterator[kv_cache.Part]  # to be evaluated
    parts: list[kv_cache.Part] = field(default_factory=list)
    written: Future[None] | None = None


class CacheFolder:
    """KV caches of prefixes in a folder, which one server at a time writes.

    A file is known by what its positions stand for: the token ids, and which of them merge.

    Args:
        settings: The server's.
        counted: Called with ``read`` or ``written`` for each prefix that was.

    Raises:
        ServeError: The folder cannot be made, or another server has it.
    """

    def __init__(self, settings: ServeSettings, counted: Callable[[str], None]):
        self._path = Path(settings.prompt_cache_dir).expanduser()
        self._limit = settings.folder_limit
        bits, group = settings.kv_bits, settings.kv_group_size
        self._quantized = None if bits is None else (bits, group)
        self._counted, self._said = counted, set[str]()
        self._files: dict[str, _Kept] = {}  # the least recently used first
        self._waiting: deque[tuple[Held, ReferenceType]]
        self._waiting = deque(maxlen=settings.prompt_cache_size)
        self._new: _New | None = None
        self._stop, self._idle, self._held = Event(), Event(), ExitStack()
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            os.scandir(self._path).close()
            self._writes = os.access(self._path, os.W_OK)
            if self._writes:
                self._held.enter_context(alone(self._path / "server", ServeError))
        except OSError as error:
            reason = f"{error.strerror}: name a folder that can be made and read"
            raise ServeError(f"`prompt_cache_dir` {self._path}: {reason}") from None
        except ServeError:
            text = f"`prompt_cache_dir` {self._path} is in use by another server: name another"
            raise ServeError(text) from None
        self._writer = ThreadPoolExecutor(1, "prompt-cache-writer")
        if not self._writes:
            self._say(f"`prompt_cache_dir` {self._path} cannot be written: it is only read")

    def open(self, model: nn.Module, sources: Sequence[Source]) -> None:
        """Lists the files of a model, one source for each K, for the generation thread to read."""
        self._model, self._embedding = model, merged_embedding(model)
        kv = None if self._quantized is None else "{} bits in groups of {}".format(*self._quantized)
        self._identities = {one.k: identity(one) | {_KV: (kv,)} for one in sources}
        others = 0
        for path in self._oldest_first():
            kept = self._files[path.name] = _Kept(path, path.stat().st_size)
            try:
                file = CacheFile.read(path)
                ks = [k for k in self._identities if self._made_with(file, k)]
                if not ks:
                    others += 1
                    continue
                kept.k, kept.whole = ks[0], bool(file.about.get("whole"))
                kept.keys = _hashes(self._stands_for(Held(file.held, kept.k)))
            except PromptError as error:
                self._ignore(kept, error)
        usable = sum(kept.keys is not None for kept in self._files.values())
        size = sum(kept.size for kept in self._files.values()) / 1e9
        _log.info("%s: %d prefixes of this model, %.2f GB in all", self._path, usable, size)
        if others:
            _log.info("%s: %d files of another model are ignored", self._path, others)

    def _oldest_first(self) -> list[Path]:
        """The files of servers; what a killed one left half-written is removed."""
        found, others = [], []
        for path in self._path.iterdir():
            if _LEFT.fullmatch(path.name) and self._writes and path.is_file():
                path.unlink(missing_ok=True)
            elif _NAME.fullmatch(path.name) and path.is_file():
                found.append((path.stat().st_mtime_ns, path))
            elif not path.name.startswith("."):
                others.append(path.name)
        if others:
            names = ", ".join(sorted(others)[:3]) + ", ..." * (len(others) > 3)
            self._say(f"{self._path}: {len(others)} files are not a server's: {names}")
        return [path for _, path in sorted(found)]

    def _made_with(self, file: CacheFile, k: int) -> bool:
        try:
            file.check(self._identities[k])
        except PromptError:
            return False
        return True

    def _stands_for(self, held: Held) -> list[Hashable]:
        """What each position stands for, the same in every process, which a slot is not."""
        embedding, found = self._embedding, []
        if embedding is None:
            check_ids((i for s in held.segments for i in s.ids), table_rows(self._model))
        else:
            embedding.check(held.segments)
        for segment in held.segments:
            merges = segment.merge and held.k > 1
            found += embedding.keys(segment.ids, held.k) if merges else segment.ids
        return found

    def read(
        self, held: Held, known: int, memory: host.LRUPromptCache
    ) -> tuple[list[Any], int] | None:
        """The KV caches of a prompt's beginning, if a file holds one that is worth to be read.

        Args:
            held: What the positions of the prompt stand for.
            known: How many of them are in memory.
            memory: What is kept there, which gives way.

        Returns:
            The caches, evaluated, and how many positions they hold: at most all but the last.
        """
        stands_for = self._stands_for(held)
        keys, room = _hashes(stands_for[:-1]), min(memory.max_bytes, machine_memory())
        while found := self._best(keys, room, known):
            kept, positions = found
            memory.trim_to(n_bytes=memory.max_bytes - kept.size)
            try:
                cache = self._load(kept, stands_for[:positions])
            except _FAULTS as error:
                self._ignore(kept, error)
                continue
            self._used(kept)
            self._counted("read")
            return cache, positions
        if found := self._best(keys, room):  # it serves from memory
            self._used(found[0])
        return None

    def encode(self, held: Held, cached: int) -> None:
        """Encodes the blocks of a prompt that are left to read after its cached positions."""
        if self._embedding is not None:
            self._embedding.compress(held.segments, held.k, cached)

    def _best(
        self, keys: np.ndarray, room: float = float("inf"), known: int = 0
    ) -> tuple[_Kept, int] | None:
        """The file that holds most of some first positions, and how many these are."""
        best = None, known
        for kept in self._files.values():
            if kept.keys is None or kept.size > room:
                continue
            count = min(len(kept.keys), len(keys))
            same = kept.keys[:count] == keys[:count]
            count = count if same.all() else int(same.argmin())
            usable = count == len(kept.keys) or not kept.whole
            if usable and count > best[1] and count - known > WORTH * len(kept.keys):
                best = kept, count
        return best if best[0] else None

    def _load(self, kept: _Kept, stands_for: Sequence[Hashable]) -> list[Any]:
        file, positions = CacheFile.read(kept.path), len(stands_for)
        file.check(self._identities[kept.k])
        held = self._stands_for(Held(file.held, kept.k))
        if held[:positions] != stands_for or file.digest is None or not file.sealed:
            raise PromptError(f"{kept.path} is not what it was, or was not written by a server")
        cache = file.load(self._model, len(held))
        for layer, own in zip(cache, host.make_prompt_cache(self._model), strict=True):
            quantized = getattr(layer, "bits", None), getattr(layer, "group_size", None)
            if type(layer) is not type(own) and quantized != self._quantized:
                raise PromptError(f"{kept.path} holds other KV caches than this server makes")
        if excess := len(held) - positions:
            if not host.can_trim_prompt_cache(cache):
                raise PromptError(f"{kept.path} holds a state that cannot be trimmed")
            host.trim_prompt_cache(cache, excess)
        return cache

    def keep(self, held: Held, entry: Any) -> None:
        """Has an entry of mlx-lm's cache written later, if that keeps it until then."""
        if self._writes:
            self._idle.clear()
            self._waiting.append((held, ref(entry)))

    def step(self) -> None:
        """Goes on writing, for a moment; the generation thread calls it between its steps."""
        try:
            if self._new is None:
                self._new = self._next()
            if (new := self._new) is None:
                self._idle.set()
            elif new.written is None:
                self._evaluate(new)
            elif new.written.done():
                self._new = None
                self._put(new)
        except _FAULTS as error:
            self._new = None
            reason = getattr(error, "strerror", None) or first_line(error)
            self._say(f"cannot write to `prompt_cache_dir` {self._path}: {reason}")

    def _next(self) -> _New | None:
        """The next entry to write."""
        while self._waiting and not self._stop.is_set():
            held, waits = self._waiting.popleft()
            if (entry := waits()) is None:  # memory let go of it
                continue
            cache, keys = entry.prompt_cache, _hashes(self._stands_for(held))
            best = self._best(keys)
            is_there = best is not None and len(keys) - best[1] <= WORTH * len(keys)
            if is_there or not kv_cache.have_read(cache, len(keys)):
                continue
            about = {"whole": not host.can_trim_prompt_cache(cache)}
            own = self._identities[held.k]
            named = json.dumps([own, [[s.merge, *s.ids] for s in held.segments]]).encode()
            path = self._path / f"{hashlib.sha256(named).hexdigest()}.safetensors"
            file = CacheFile(path, own, held.segments, about)
            kinds = [type(layer).__name__ for layer in cache]
            parts = kv_cache.parts([kv_cache.compact(layer) for layer in cache])
            return _New(file, _Kept(path, 0, held.k, keys, about["whole"]), kinds, parts)
        return None

    def _evaluate(self, new: _New) -> None:
        """Evaluates a piece of an entry; after the last one, the writer has it."""
        size = 0
        for part in new.left:
            new.parts.append(part)
            if (size := size + len(part.data)) >= PIECE_BYTES:
                return
        size = sum(len(part.data) for part in new.parts)
        if size > self._limit:
            self._new = None
            self._say(f"`prompt_cache_dir_bytes` {self._limit:,} holds no prefix of {size:,} bytes")
            return
        self._make_room(size, new.kept.path.name)
        # The writer finds the parts through ``self``: a reference of its own might be the last one.
        new.written = self._writer.submit(self._write)

    def _write(self) -> None:
        self._new.file.write(self._new.kinds, self._new.parts, self._stop)

    def _put(self, new: _New) -> None:
        """Lists a file that is written, in the place of those that it serves for."""
        new.written.result()
        kept = new.kept
        kept.size = kept.path.stat().st_size
        for name, other in list(self._files.items()):
            count = 0 if other.keys is None or kept.whole else len(other.keys)
            serves = WORTH * len(kept.keys) < count <= len(kept.keys)
            if serves and (other.keys == kept.keys[:count]).all():
                self._remove(name)
        self._files[kept.path.name] = kept
        self._make_room(0)
        self._counted("written")

    def _make_room(self, size: int, *names: str) -> None:
        used = size + sum(kept.size for kept in self._files.values())
        for name in dict.fromkeys((*names, *self._files)):
            if name in names or used > self._limit:
                used -= self._remove(name)

    def _remove(self, name: str) -> int:
        """Removes a file, if it is there; returns the bytes that it took."""
        if (kept := self._files.pop(name, None)) is None:
            return 0
        kept.path.unlink(missing_ok=True)
        return kept.size

    def _used(self, kept: _Kept) -> None:
        self._files[kept.path.name] = self._files.pop(kept.path.name)
        with suppress(OSError):
            os.utime(kept.path)

    def _ignore(self, kept: _Kept, error: Exception) -> None:
        kept.keys = None
        reason = first_line(error).removeprefix(f"{kept.path}").lstrip(": ").split(": make it")[0]
        self._say(f"{kept.path} is of no use, and takes room until it is removed: {reason}")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning(text)

    def flushing(self) -> Callable[[], bool]:
        """Tells, whenever it is called, whether something is still to be written.

        What is finished by now counts, also if the generation thread has not kept it yet: only its
        next step can say that it is idle.
        """
        self._idle.clear()
        return lambda: not (self._idle.is_set() or self._stop.is_set())

    def close(self) -> None:
        """Ends the writing, and gives the folder back; in the generation thread."""
        self._stop.set()
        self._writer.shutdown()
        self._new = None
        self._held.close()
