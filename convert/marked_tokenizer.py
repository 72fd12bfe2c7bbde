"""Reads and writes the tokenizers of LCLM, in which two tokens stand around a merged text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kmerge_mlx.base import MAX_TEXT_BYTES
from kmerge_mlx.config import is_int
from kmerge_mlx.errors import CheckpointError, collect, first_line, short
from kmerge_mlx.files import check_plain, flush

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
COPIED = ("chat_template.jinja", "chat_template.json", "generation_config.json")
MARKS = ("<|memory|>", "<|memory_start|>", "<|memory_end|>")


def read_marks(path: Path) -> dict[str, int]:
    """The tokens around a merged text, by name."""
    added = _read(path).get("added_tokens")
    entries = [e for e in added if isinstance(e, dict)] if isinstance(added, list) else []
    found = {e.get("content"): e.get("id") for e in entries if isinstance(e.get("content"), str)}
    lacking = [mark for mark in MARKS[1:] if not is_int(found.get(mark), 0)]
    if lacking:
        raise CheckpointError(f"{path} has no token {', '.join(lacking)}: not a tokenizer of LCLM")
    return {mark: found[mark] for mark in MARKS if mark in found}


def text_problems(folder: Path) -> list[str]:
    """What is wrong with the JSON files that :func:`write_tokenizer` copies, one line each."""
    problems: list[str] = []
    for name in (TOKENIZER, TOKENIZER_CONFIG, *COPIED):
        if name.endswith(".json") and (name == TOKENIZER or (folder / name).is_file()):
            collect(problems, _read, folder / name)
    return problems


def _read(path: Path) -> dict[str, Any]:
    try:
        check_plain(path, MAX_TEXT_BYTES, CheckpointError)
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({first_line(error)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {short(data)}, expected an object")
    return data


def write_tokenizer(source: Path, folder: Path, without: tuple[str, ...]) -> None:
    """Copies a tokenizer ``without`` some tokens, which no text can spell then."""
    data = _read(source / TOKENIZER)
    if without:
        kept = [e for e in data["added_tokens"] if not _names(e, without)]
        data["added_tokens"] = kept
    write_text(folder / TOKENIZER, json.dumps(data, ensure_ascii=False))
    if (source / TOKENIZER_CONFIG).is_file():
        about = _read(source / TOKENIZER_CONFIG)
        write_text(folder / TOKENIZER_CONFIG, json.dumps(_without(about, without), indent=2))
    for name in COPIED:
        if (source / name).is_file():
            shutil.copy(source / name, folder)
            flush(folder / name)


def _without(value: Any, tokens: tuple[str, ...]) -> Any:
    """JSON without the lists' items and the objects' entries that are some tokens."""
    if isinstance(value, list):
        return [_without(v, tokens) for v in value if not _names(v, tokens)]
    if isinstance(value, dict):
        return {n: _without(v, tokens) for n, v in value.items() if not _names(v, tokens)}
    return value


def _names(value: Any, tokens: tuple[str, ...]) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    return isinstance(content, str) and content in tokens


def write_text(path: Path, text: str) -> None:
    """Writes a text, and flushes it to the disk."""
    path.write_text(text + "\n", encoding="utf-8")
    flush(path)
