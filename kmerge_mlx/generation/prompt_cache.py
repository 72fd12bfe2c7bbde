"""Reads and writes KV caches of prompts on disk, with the tokens that their positions stand for.

Source: ``mlx_lm.models.cache.save_prompt_cache``; our part is one entry of its metadata, so that
mlx-lm itself can load the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from threading import Event
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, wired_limit
from mlx_lm.models import cache as host
from safetensors import safe_open

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import ENCODER, MERGE_WEIGHTS, TUNING_CONFIG, TUNING_WEIGHTS
from kmerge_mlx.errors import PromptError, findings, first_line, short
from kmerge_mlx.files import (
    ALL_DTYPES,
    MAX_HEADER_BYTES,
    PIECE_BYTES,
    replacing_file,
    safetensors_shapes,
)
from kmerge_mlx.generation import kv_cache
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.source import Source
from kmerge_mlx.virtual_tokens import CompressedPrompt

ENTRY = "kmerge_mlx"
VERSION = 1
_SEAL = "seal"  # a digest of the other entries
_BASE, _ADAPTER, _K = "the base model", "the adapter", "--k"
"""The file's names for what it belongs to."""


def _seal(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def identity(source: Source) -> dict[str, tuple[Any, ...]]:
    """What a prompt cache belongs to, by name: base, adapter and K.

    Each has all values by which a file may know it: the first is written, and the digests of
    earlier releases follow it.
    """
    adapter: tuple[Any, ...] = (None,)
    if source.adapter is not None:
        merge, digest = source.merge, hashlib.sha256()
        for name in (TUNING_CONFIG, TUNING_WEIGHTS, MERGE_WEIGHTS):
            with (source.adapter / name).open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    digest.update(piece)
        earlier = digest.hexdigest()
        head = None if merge.head_lora is None else asdict(merge.head_lora)
        digest.update(json.dumps([merge.encoder_entries(), merge.pad_token_id, head]).encode())
        if merge.has_window:
            digest.update(base.digests(source.adapter / ENCODER)[0].encode())
        adapter = digest.hexdigest(), earlier
    return {_BASE: base.digests(source.path), _ADAPTER: adapter, _K: (source.k,)}


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
    identity: Mapping[str, Sequence[Any]]
    held: Sequence[Segment]
    about: Mapping[str, Any]
    """How the prompt was made, for whoever goes on with it."""
    digest: str | None = None
    """Of the KV caches; files of 0.1.0 have none."""
    sealed: bool = False
    """Whether a digest of all the rest was there, and right."""

    def save(self, cache: Sequence[Any]) -> None:
        """Writes the file with mlx-lm's KV caches, whole or not at all."""
        entry = self._entry(kv_cache.parts([each.state for each in cache]))
        try:
            with replacing_file(self.path) as new:
                host.save_prompt_cache(str(new), list(cache), entry)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise PromptError(f"cannot write `prompt_cache_file` {self.path}: {reason}") from error

    def write(self, kinds: Sequence[str], parts: Sequence[kv_cache.Part], stop: Event) -> None:
        """Writes what :meth:`save` would, without calling MLX, so that any thread may.

        Args:
            kinds: The kind of each layer's cache.
            parts: What they hold.
            stop: Ends it early, with an OSError and without a file.
        """
        entry = self._entry(parts)
        with replacing_file(self.path) as new, new.open("wb") as file:
            for _ in kv_cache.write(file, kinds, parts, entry):
                if stop.is_set():
                    raise InterruptedError(errno.EINTR, "the server ended")

    def _entry(self, parts: Iterable[kv_cache.Part]) -> dict[str, str]:
        entry = {
            "version": VERSION,
            "identity": {name: values[0] for name, values in self.identity.items()},
            "held": [[segment.merge, *segment.ids] for segment in self.held],
            "about": self.about,
            "digest": kv_cache.digest(parts),
        }
        text = json.dumps(entry | {_SEAL: _seal(entry)})
        if len(text) > MAX_HEADER_BYTES // 2:
            raise PromptError(
                f"the prompt is too long for a prompt cache file: its tokens take {len(text):,} "
                f"bytes of its header, which holds {MAX_HEADER_BYTES // 2:,}"
            )
        return {ENTRY: text}

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
                    f"{path}: its version is {short(version)}, expected {VERSION}: make it again"
                )
            if (seal := entry.pop(_SEAL, None)) not in (None, _seal(entry)):
                raise PromptError(f"{path} is damaged: make it again")
            held = [Segment([index(i) for i in ids], bool(merge)) for merge, *ids in entry["held"]]
            known = {name: (value,) for name, value in dict(entry["identity"]).items()}
            about, digest = dict(entry["about"]), entry.get("digest")
            return cls(path, known, held, about, digest, seal is not None)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise PromptError(f"{path}: its record of its tokens is torn: make it again") from None

    def check(self, used_with: Mapping[str, Sequence[Any]]) -> None:
        """Raises PromptError if a file was made with another model than :func:`identity` says."""
        problems = []
        for name, values in used_with.items():
            made_with = self.identity.get(name)
            if made_with is None:
                problems.append(f"it does not say what {name} it was made with: make it again")
            elif made_with[0] not in values and name == _K:
                problems.append(f"`k` is {values[0]}, the file was made with {short(made_with[0])}")
            elif made_with[0] not in values:
                problems.append(f"{name} is not the one that the file was made with")
        if problems:
            raise PromptError(findings(str(self.path), problems))

    def load(self, model: nn.Module, positions: int) -> list[Any]:
        """The model's KV caches, evaluated, with so many positions; PromptError for any others."""
        cache = kv_cache.read(self.path, model, positions)
        parts = kv_cache.parts([each.state for each in cache])
        if self.digest is not None and kv_cache.digest(parts) != self.digest:
            raise PromptError(f"{self.path} is damaged: make it again")
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
