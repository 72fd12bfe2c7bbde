"""The zip archive around a PyTorch checkpoint, read strictly.

Owns the layouts of the zip records (``torch_write`` fills them in) and their checks; knows nothing
of pickles or tensors. Not ``zipfile``, which looks for a directory behind any prefix and before any
comment, and takes overlapping entries and any number of them: ``torch.save`` writes none of that,
so here it is damage.

Source: PKWARE's APPNOTE 6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from kmerge_mlx.errors import CheckpointError

_MAX_DIRECTORY = 1 << 20  # bytes; some 12,000 entries

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
END = struct.Struct("<4s4H2LH")
_SIZES_FOLLOW, UTF8 = 1 << 3, 1 << 11  # flag bits
_FOLDER = 1 << 4  # attribute bit; torch.load returns uninitialized memory for such an entry
WIDE = 0xFFFFFFFF  # in a 32-bit field: the value is in the zip64 record

_STORE = "re-save it in PyTorch, which stores without compression or a password"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive: where its header and its bytes start, how many, their CRC-32."""

    header: int
    start: int
    size: int
    crc: int
    plain: bool  # neither compressed nor encrypted


class Archive:
    """The entries of one zip file, by their name under its single root folder.

    Compressed entries may be listed (TorchScript has some) but are never read.

    Args:
        file: The zip file, open for reading.
        length: Its size in bytes.

    Raises:
        CheckpointError: The records contradict each other or the length.
    """

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._length = length
        self.entries: dict[str, Entry] = {}
        roots = set()
        offset, size, count = self._find_directory()
        directory, at = self._slice(offset, size), 0
        for _ in range(count):
            name, entry, at = self._entry(directory, at)
            root, _, name = name.partition("/")
            roots.add(root)
            if len(roots) > 1:
                raise CheckpointError(f"found {name!a:.60} in a second root folder, expected one")
            if name in self.entries:
                raise CheckpointError(f"found the zip entry {name!a:.60} twice, expected it once")
            self.entries[name] = entry
        if at != size:
            raise CheckpointError(f"found {size} bytes of zip directory, expected {at}")
        end = 0
        for entry in sorted(self.entries.values(), key=lambda entry: entry.header):
            if entry.header < end or entry.start + entry.size > offset:
                raise CheckpointError(f"found overlapping zip entries at byte {entry.header}")
            end = entry.start + entry.size

    def read(self, name: str) -> bytes:
        """Reads one whole entry and checks its CRC-32.

        Args:
            name: A key of ``entries``.

        Raises:
            CheckpointError: It is compressed or encrypted, or not what was written.
        """
        entry = self.entries[name]
        if not entry.plain:
            found = f"found {name!a:.60} compressed or encrypted, expected it stored"
            raise CheckpointError(found, _STORE)
        data = self._slice(entry.start, entry.size)
        if zlib.crc32(data) != entry.crc:
            why = "damaged, or saved after torch.serialization.set_crc32_options(False)"
            raise CheckpointError(f"found a wrong CRC-32 for {name!a:.60} ({why})")
        return data

    def _slice(self, start: int, size: int) -> bytes:
        if start < 0 or start + size > self._length:
            raise CheckpointError(
                f"found {self._length} bytes, expected more: its zip records point past them"
            )
        self._file.seek(start)
        data = self._file.read(size)
        if len(data) != size:
            raise CheckpointError("found fewer bytes than a moment ago")
        return data

    def _find_directory(self) -> tuple[int, int, int]:
        """Returns the directory's offset and size in bytes, and its number of entries."""
        end = self._length - END.size
        magic, *disks, count, size, offset, comment = END.unpack(self._slice(end, END.size))
        if magic != b"PK\5\6" or comment:
            raise CheckpointError(
                "found no zip directory at its very end: cut short or appended to"
            )
        locator = self._slice(max(0, end - LOCATOR.size), LOCATOR.size)
        if locator.startswith(b"PK\6\7"):
            end -= LOCATOR.size + END64.size
            record = END64.unpack(self._slice(end, END64.size))
            *wide_disks, wide_count, wide_size, wide_offset = record[4:]
            if (
                LOCATOR.unpack(locator)[1:] != (0, end, 1)
                or record[0] != b"PK\6\6"
                or count not in (wide_count, 0xFFFF)
                or size not in (wide_size, WIDE)
                or offset not in (wide_offset, WIDE)
            ):
                raise CheckpointError("found a zip64 record that contradicts the zip directory")
            disks, count, size, offset = wide_disks, wide_count, wide_size, wide_offset
        if disks != [0, 0, count] or offset + size != end or size > _MAX_DIRECTORY:
            raise CheckpointError(
                f"found no zip directory of {size} bytes at byte {offset}, its place"
            )
        return offset, size, count

    def _entry(self, directory: bytes, at: int) -> tuple[str, Entry, int]:
        """Parses the directory record at ``at``; returns name, entry and the next position."""
        stop = at + CENTRAL.size
        if stop > len(directory) or not directory.startswith(b"PK\1\2", at):
            raise CheckpointError("found fewer entries in the zip directory than it states")
        _, _, _, flags, method, _, _, crc, *rest = CENTRAL.unpack(directory[at:stop])
        packed, size, n_name, n_extra, n_comment, disk, _, attributes, header = rest
        raw = directory[stop : stop + n_name]
        stop += n_name + n_extra
        name = _checked_name(raw)
        size, packed, header = _widened(directory[stop - n_extra : stop], size, packed, header)
        local = LOCAL.unpack(self._slice(header, LOCAL.size))
        magic, _, *same, _, _, local_crc, local_packed, local_size, n_name_here, n_pad = local
        unset = {0} if flags & _SIZES_FOLLOW else set()
        start = header + LOCAL.size + n_name_here
        if (
            magic != b"PK\3\4"
            or same != [flags, method]
            or self._slice(header + LOCAL.size, n_name_here) != raw
            or local_packed not in {packed, WIDE} | unset
            or local_size not in {size, WIDE} | unset
            or local_crc not in {crc} | unset
            or disk
            or attributes & _FOLDER
        ):
            raise CheckpointError(f"found two different headers for {name!a:.60}, expected one")
        plain = not method and packed == size and not flags & ~(_SIZES_FOLLOW | UTF8)
        entry = Entry(header, start + n_pad, packed, crc, plain)
        return name, entry, stop + n_comment


def _checked_name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"found the zip entry name {raw!a:.60}, expected UTF-8") from None
    parts = name.split("/")
    if len(parts) < 2 or {"", ".", ".."} & set(parts) or "\\" in name or not name.isprintable():
        raise CheckpointError(f"found the zip entry name {name!a:.60}, expected root/file")
    return name


def _widened(extra: bytes, *fields: int) -> list[int]:
    """Replaces each field that says so by its value in the zip64 part of the extra bytes."""
    wide, at = b"", 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    widened = [next(values, -1) if field == WIDE else field for field in fields]
    if -1 in widened:
        raise CheckpointError("found a zip entry without the zip64 sizes that it points to")
    return widened
