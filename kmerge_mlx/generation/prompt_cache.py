"""Reads and writes KV caches of prompts on disk, with the tokens that their positions stand for.

Source: ``mlx_lm.models.cache.save_prompt_cache``; our part is one entry of its metadata, so that
mlx-lm itself can load the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, wired_limit
from mlx_lm.models import cache as host
from safetensors import safe_open

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import MERGE_WEIGHTS, TUNING_CONFIG, TUNING_WEIGHTS
from kmerge_mlx.errors import PromptError, findings, first_line
from kmerge_mlx.files import ALL_DTYPES, MAX_HEADER_BYTES, replacing_file, safetensors_shapes
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.source import Source
from kmerge_mlx.virtual_tokens import CompressedPrompt

ENTRY = "kmerge_mlx"
VERSION = 1
_K = "--k"
"""The file's name for the merge factor."""


@dataclass(frozen=True)
class CacheFile:
    """What a prompt cache file holds.

    Args:
        cache: mlx-lm's KV caches, one a layer.
        held: What its positions stand for, in order.
        about: How the prompt was made, as given to :func:`save`.
    """

    cache: list[Any]
    held: list[Segment]
    about: dict[str, Any]


def identity(source: Source) -> dict[str, Any]:
    """What a prompt cache belongs to, by name: digests of base and adapter, and K.

    The base's is that of :func:`base.weights_digest`.
    """
    adapter = None
    if source.adapter is not None:
        digest = hashlib.sha256()
        for name in (TUNING_CONFIG, TUNING_WEIGHTS, MERGE_WEIGHTS):
            digest.update((source.adapter / name).read_bytes())
        adapter = digest.hexdigest()
    digests = {"the base model": base.weights_digest(source.path), "the adapter": adapter}
    return digests | {_K: source.k}


def prefill(
    model: nn.Module,
    prompt: CompressedPrompt,
    max_kv_size: int | None = None,
    **options: Any,
) -> list[Any]:
    """Reads a prompt into a new KV cache.

    Args:
        model: A model from :func:`kmerge_mlx.load`.
        prompt: What to read.
        max_kv_size: Most positions that the cache keeps, or None: all.
        **options: Of ``mlx_lm.generate.generate_step``: ``kv_bits``, ``prefill_step_size``, ...

    Returns:
        mlx-lm's KV caches, evaluated.
    """
    cache = host.make_prompt_cache(model, max_kv_size)
    with wired_limit(model):
        ids = mx.array(prompt.ids)
        for _ in generate_step(ids, model, max_tokens=0, prompt_cache=cache, **options):
            pass
        mx.eval([c.state for c in cache])
    return cache


def save(
    path: Path,
    cache: Sequence[Any],
    held: Sequence[Segment],
    made_with: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    """Writes a prompt cache file, whole or not at all.

    Args:
        path: The file.
        cache: mlx-lm's KV caches.
        held: What their positions stand for.
        made_with: What the file belongs to, from :func:`identity`.
        about: How the prompt was made, for whoever goes on with it.

    Raises:
        PromptError: It cannot be written.
    """
    entry = {
        "version": VERSION,
        "identity": dict(made_with),
        "held": [[segment.merge, *segment.ids] for segment in held],
        "about": dict(about),
    }
    text = json.dumps(entry)
    if len(text) > MAX_HEADER_BYTES // 2:
        raise PromptError(
            f"the prompt is too long for a prompt cache file: its tokens take {len(text):,} bytes "
            f"of its header, which holds {MAX_HEADER_BYTES // 2:,}"
        )
    try:
        with replacing_file(path) as new:
            host.save_prompt_cache(str(new), list(cache), {ENTRY: text})
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise PromptError(f"cannot write `prompt_cache_file` {path}: {reason}") from error


def read_about(path: Path) -> dict[str, Any]:
    """How the prompt of a prompt cache file was made; the cache itself is not read.

    Raises:
        PromptError: Torn, or not of this package.
    """
    return _entry(path)["about"]


def load(path: Path, used_with: Mapping[str, Any]) -> CacheFile:
    """Reads a prompt cache file.

    Args:
        path: The file.
        used_with: What the model at hand is, from :func:`identity`.

    Raises:
        PromptError: Torn, not of this package, or of another base, adapter or K (named).
    """
    entry = _entry(path)
    problems = [
        f"`k` is {used_with.get(name)}, the file was made with {value}"
        if name == _K
        else f"{name} is not the one that the file was made with"
        for name, value in entry["identity"].items()
        if used_with.get(name) != value
    ]
    if problems:
        raise PromptError(findings(str(path), problems))
    try:
        cache = host.load_prompt_cache(str(path))
        mx.eval([c.state for c in cache])
    except Exception as error:  # mlx-lm raises anything on a file that is torn inside
        raise PromptError(f"{path} is not a prompt cache: {first_line(error)}") from error
    held = [Segment(ids, merge) for merge, *ids in entry["held"]]
    return CacheFile(cache, held, entry["about"])


def begins_with(segments: Sequence[Segment], held: Sequence[Segment]) -> bool:
    """Whether a prompt begins with the segments that a file holds; a raw run may go on."""
    for number, part in enumerate(held):
        if number >= len(segments) or segments[number].merge != part.merge:
            return False
        ids = list(segments[number].ids)
        goes_on = number == len(held) - 1 and not part.merge
        if (ids[: len(part.ids)] if goes_on else ids) != list(part.ids):
            return False
    return True


def common_start(prompts: Sequence[Sequence[Segment]]) -> list[Segment]:
    """What several prompts begin with alike: whole merged runs, and tokens that are raw."""
    start: list[Segment] = []
    for parts in zip(*prompts, strict=False):
        if len({part.merge for part in parts}) > 1:
            break
        columns = zip(*(part.ids for part in parts), strict=False)
        ids = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]
        whole = all(list(part.ids) == ids for part in parts)
        if ids and (whole or not parts[0].merge):
            start.append(Segment(ids, parts[0].merge))
        if not whole:
            break
    return start


def _entry(path: Path) -> dict[str, Any]:
    """Our part of the file's metadata, checked."""
    safetensors_shapes(path, PromptError, ALL_DTYPES)
    with safe_open(str(path), framework="numpy") as file:
        # mlx-lm numbers its parts: the user's metadata come first.
        text = (file.metadata() or {}).get(f"0.{ENTRY}")
    if text is None:
        raise PromptError(
            f"{path} does not record which tokens it holds: make it with `kmerge-mlx cache`"
        )
    try:
        entry = json.loads(text)
        version, held = entry["version"], entry["held"]
        good = isinstance(entry["identity"], dict) and isinstance(entry["about"], dict)
        good &= all(isinstance(s[0], bool) and all(type(i) is int for i in s[1:]) for s in held)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        good, version = False, VERSION
    if version != VERSION:
        raise PromptError(f"{path}: its version is {version!r}, expected {VERSION}: make it again")
    if not good:
        raise PromptError(f"{path}: its record of its tokens is torn: make it again")
    return entry
