"""Names the format of data that was taken for text: a PDF, a zip archive, UTF-16, other bytes."""

from __future__ import annotations

_BEGINNINGS = {
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive, as .docx, .xlsx, .pptx, .odt and .epub are",
    b"\xd0\xcf\x11\xe0": "an old Office document (.doc, .xls, .ppt)",
    b"{\\rtf": "RTF",
    b"\x1f\x8b": "compressed by gzip",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def not_text(data: bytes) -> str | None:
    """What the beginning of a file shows it to be, in words; None for what may be text."""
    known = (name for begin, name in _BEGINNINGS.items() if data.startswith(begin))
    return next(known, "binary, not text" if b"\0" in data else None)
