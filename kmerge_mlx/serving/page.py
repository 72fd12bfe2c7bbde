"""The page that ``serve`` answers at ``/``, and the headers that keep it to this server."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from pathlib import Path

PAGE = Path(__file__).with_name("page.html").read_bytes()
"""One file of HTML, CSS and JavaScript, which loads nothing else."""


def _hash_of(tag: str) -> str:
    """How a policy allows what stands in an element, and nothing else of its kind."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), PAGE, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(text).digest()).decode()}'"


_POLICY = {
    "default-src": "'none'",
    "script-src": _hash_of("script"),
    "style-src": _hash_of("style"),
    "img-src": "data:",  # its icon
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # text cannot become HTML
}

HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Beside it: nothing but its own script and style runs, and it can reach this server alone."""
