"""Takes this machine's paths out of what an adapter says of itself, so that it may leave it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmerge_mlx.adapters.schema import MergeConfig
from kmerge_mlx.bundled import BUNDLED

# How a path begins that says where on a machine it lies; on Windows, too.
_START = r"(?:file://|~\w*/|/|(?:\.\./)+|[A-Za-z]:\\|\\\\)"
_WHOLE = re.compile(_START)
_BEFORE = r"(?<![\w:/.~\\])"  # not within a word, an address or a path
_PATH = re.compile(rf"{_BEFORE}{_START}[^\s'\",;:()\[\]{{}}<>|`]+")
_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})\Z")


def portable(merge: MergeConfig, folder: Path) -> MergeConfig:
    """What an adapter in ``folder`` says of itself; its base as :func:`stored_id` gives it."""
    made_for = replace(merge.base, id=stored_id(merge.base.id, folder))
    return replace(merge, base=made_for, provenance=without_paths(dict(merge.provenance)))


def stored_id(name: str | None, folder: Path) -> str | None:
    """A base model as files in ``folder`` name it: a hub repo as it is, a folder from there.

    A folder starts with ``./`` or ``../``. One that is not on this machine keeps its last part.
    """
    if name is None or name == BUNDLED:
        return name
    if not os.path.isdir(name):  # noqa: PTH112 (Path's fails on a name too long)
        return _last_part(name) if _WHOLE.match(name) else name
    place = os.path.realpath(name)
    if cached := _SNAPSHOT.search(place):
        return "{}/{}@{}".format(*cached.groups())
    relative = os.path.relpath(place, os.path.realpath(folder))
    return relative if relative.startswith("..") else f"./{relative}"


def found_id(name: str | None, folder: Path) -> str | None:
    """The reverse of :func:`stored_id`; what is not there stays as it is."""
    if name is None or not name.startswith(("./", "../")):
        return name
    place = os.path.join(folder, name)  # noqa: PTH118
    return os.path.realpath(place) if os.path.isdir(place) else name  # noqa: PTH112


def without_paths(
    value: Any, changed: Callable[[str, str, str], object] = lambda *_: None, where: str = ""
) -> Any:
    """The same JSON with each path of a machine cut down to its last part, in keys as well.

    ``changed`` receives where a text stands (``.a.b`` below ``where``), the text, and the new one.
    """
    if isinstance(value, dict):
        cut = {key: without_paths(key, changed, where) for key in value}
        return {cut[k]: without_paths(v, changed, f"{where}.{cut[k]}") for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, changed, where) for inner in value]
    if not isinstance(value, str):
        return value
    new = value
    if home := os.path.expanduser("~").rstrip("/"):  # noqa: PTH111 (Path's fails without one)
        new = re.sub(f"{_BEFORE}{re.escape(home)}/", "~/", value)  # it may hold a space
    whole = _WHOLE.match(new) and "\n" not in new
    new = _last_part(new) if whole else _PATH.sub(lambda match: _last_part(match[0]), new)
    if new != value:
        changed(where, value, new)
    return new


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "/"
