"""Damages files at random, and says how much memory reading them took."""

from __future__ import annotations

import random
import re
import resource
from pathlib import Path


def damaged(good: bytes, draw: random.Random, head: int | None = None) -> bytes:
    """Bytes changed, cut out, repeated, or the rest cut off; most in the first ``head``."""
    data = bytearray(good)
    at = draw.randrange(len(data) if head is None or draw.random() < 0.2 else min(head, len(data)))
    size = draw.choice((1, 2, 4, 16, 64))
    match draw.randrange(7):
        case 0 | 1:
            data[at] ^= 1 << draw.randrange(8)
        case 2 | 3:
            data[at] = draw.choice(b'{}[]",:0-9eE\\\0\x01\x08\x7f\x80\xff ')
        case 4:
            del data[at : at + size]
        case 5:
            data[at:at] = data[at : at + size]
        case _:
            del data[at:]
    return bytes(data)


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    # Not Linux's ru_maxrss: after fork and exec that starts at what the parent, with torch, has.
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
