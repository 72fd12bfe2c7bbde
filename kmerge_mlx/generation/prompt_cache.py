"""Reads and writes KV caches of prompts on disk, with the tokens that their positions stand for.

Source: ``mlx_lm.models.cache.save_prompt_cache``; our part is one entry of its metadata, so that
mlx-lm itself can load the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
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


def identity(source: Source) -> dict[str, Any]:
    """What a prompt cache belongs to, by name: digests of base and adapter, and K."""
    adapter = None
    if source.adapter is not None:
        digest = hashlib.sha256()
        for name in (TUNING_CONFIG, TUNING_WEIGHTS, MERGE_WEIGHTS):
            digest.update((source.adapter / name).read_bytes())
        adapter = digest.hexdigest()
    digests = {"the base model": base.weights_digest(source.path), "the adapter": adapter}
    return digests | {_K: source.k}


def prefill(
    model: nn.Module, prompt: CompressedPrompt, max_kv_size: int | None = None, **options: Any
) -> list[Any]:
    """Reads a prompt into new KV caches of mlx-lm, evaluated; ``generate_step``'s options."""
    cache = host.make_prompt_cache(model, max_kv_size)
    with wired_limit(model):
        ids = mx.array(prompt.ids)
        for _ in generate_step(ids, model, max_tokens=0, prompt_cache=cache, **options):
            pass
        mx.eval([c.state for c in cache])
    return cache


@dataclass(frozen=True)
class CacheFile:
    """A prompt cache file: its model's :func:`identity`, and what its positions stand for."""

    path: Path
    identity: dict[str, Any]
    held: Sequence[Segment]
    about: dict[str, Any]
    """How the prompt was made, for whoever goes on with it."""

    def save(self, cache: Sequence[Any]) -> None:
        """Writes the file with mlx-lm's KV caches, whole or not at all."""
        entry = {
            "version": VERSION,
            "identity": self.identity,
            "held": [[segment.merge, *segment.ids] for segment in self.held],
            "about": self.about,
        }
        text = json.dumps(entry)
        if len(text) > MAX_HEADER_BYTES // 2:
            raise PromptError(
                f"the prompt is too long for a prompt cache file: its tokens take {len(text):,} "
                f"bytes of its header, which holds {MAX_HEADER_BYTES // 2:,}"
            )
        try:
            with replacing_file(self.path) as new:
                host.save_prompt_cache(str(new), list(cache), {ENTRY: text})
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise PromptError(f"cannot write `prompt_cache_file` {self.path}: {reason}") from error

    @classmethod
    def read(cls, path: Path) -> CacheFile:
        """Reads what a file records, but not the KV caches."""
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
            if (version := entry["version"]) != VERSION:
                raise PromptError(
                    f"{path}: its version is {version!r}, expected {VERSION}: make it again"
                )
            held = [Segment([index(i) for i in ids], bool(merge)) for merge, *ids in entry["held"]]
            return cls(path, dict(entry["identity"]), held, dict(entry["about"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PromptError(f"{path}: its record of its tokens is torn: make it again") from None

    def load(self, used_with: Mapping[str, Any]) -> list[Any]:
        """mlx-lm's KV caches, evaluated, for the model that :func:`identity` describes."""
        problems = [
            f"`k` is {used_with.get(name)}, the file was made with {value}"
            if name == _K
            else f"{name} is not the one that the file was made with"
            for name, value in self.identity.items()
            if used_with.get(name) != value
        ]
        if problems:
            raise PromptError(findings(str(self.path), problems))
        try:
            cache = host.load_prompt_cache(str(self.path))
            mx.eval([c.state for c in cache])
        except Exception as error:  # mlx-lm raises anything on a file that is torn inside
            raise PromptError(f"{self.path} is not a prompt cache: {first_line(error)}") from error
        return cache


def common_start(prompts: Sequence[Sequence[Segment]]) -> list[Segment]:
    """What several prompts begin with alike: whole merged runs, and tokens that are raw."""

    def units(segments: Sequence[Segment]) -> Iterator[Segment]:
        for segment in segments:
            yield from [segment] if segment.merge else (Segment([i], False) for i in segment.ids)

    start: list[Segment] = []
    for unit, *others in zip(*map(units, prompts), strict=False):
        if any(other != unit for other in others):
            break
        if unit.merge or not start or start[-1].merge:
            start.append(unit)
        else:
            start[-1].ids.extend(unit.ids)
    return start
