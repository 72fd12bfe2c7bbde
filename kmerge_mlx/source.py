"""Finds the base model and the adapter that names mean, once for a whole command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import AdapterFolders, carried_by, look_up
from kmerge_mlx.adapters.schema import MergeConfig
from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.errors import AdapterError, ModelError, PromptError


@dataclass(frozen=True)
class Source:
    """A base model and an adapter, found on this machine; without an adapter nothing merges."""

    model: str  # what the base is called: a folder, a hub repo id, or ``bundled``
    path: Path  # its folder
    adapter_path: str | None = None  # what the adapter is called
    adapter: Path | None = None  # its folder, for this K
    merge: MergeConfig | None = None  # its merge_config.json
    trust_remote_code: bool = False  # let the base's own Python files run

    @classmethod
    def find(
        cls,
        model: str | None = None,
        adapter_path: str | Path | None = None,
        k: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> Source:
        """Finds both, downloading what is on the hub.

        Without ``model`` it is the base that the adapter names, or the bundled one; without
        ``adapter_path`` the adapter that the model's folder carries, if any.
        """
        name, path, folders = _look_up(model, adapter_path, revision)
        if folders is None:
            check_unmerged(k, name)
            return cls(name, path, trust_remote_code=trust_remote_code)
        folder, merge = folders.choose(k)
        path = path or _resolve(name, model, folders, revision)
        return cls(name, path, folders.name, folder, merge, trust_remote_code)

    @classmethod
    def find_all(
        cls,
        model: str | None = None,
        adapter_path: str | Path | None = None,
        ks: Sequence[int] = (),
        trust_remote_code: bool = False,
        needed: bool = True,
    ) -> list[Source]:
        """Finds the base and the adapters for ``ks``, ascending; without ``ks`` for all there are.

        1 is the base model alone where there is no adapter for it. Where there are no adapters at
        all, other ``ks`` are refused, or, unless they are ``needed``, taken as 1.
        """
        name, path, folders = _look_up(model, adapter_path)
        found = {} if folders is None else folders.found
        ks = sorted({*(ks or found or (1,))})
        if folders is None and not needed:
            ks = [1]
        elif folders is None:
            check_unmerged(ks[-1], name)
        chosen = [folders.choose(k) if k != 1 or k in found else (None, None) for k in ks]
        path = path or _resolve(name, model, folders)
        called = None if folders is None else folders.name
        return [cls(name, path, called, *one, trust_remote_code) for one in chosen]

    @classmethod
    def find_set(
        cls,
        model: str | None = None,
        adapter_path: str | Path | None = None,
        k: int | None = None,
        trust_remote_code: bool = False,
    ) -> list[Source]:
        """Finds the base and the adapter for ``k``; without ``k`` all that there are.

        Of the bundled model's, which are no set, it is the default one.
        """
        bundled = adapter_path == BUNDLED or (adapter_path is None and model in (None, BUNDLED))
        if bundled or k is not None:
            return [cls.find(model, adapter_path, k, trust_remote_code)]
        return cls.find_all(model, adapter_path, (), trust_remote_code)

    @property
    def k(self) -> int:
        """The merge factor; 1 where nothing merges."""
        return 1 if self.merge is None else self.merge.merge_factor

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's config as :func:`base.read_config` gives it, read once."""
        return base.read_config(self.path)


def without_encoder(found: str, model: str) -> str:
    """What to say where something merges and there is no adapter, with what helps."""
    return (
        f"{found}, and there is no merge encoder: give `adapter_path`, or `k` 1 to read without "
        f"merging. `kmerge-mlx train --model {shlex.quote(model)} --data DIR --adapter-path OUT` "
        "trains one (docs/guide.md), `kmerge-mlx convert` takes one of the paper's checkpoints"
    )


def refuse_unknown(text: str) -> None:
    """Refuses a text that the bundled model cannot know, where nobody asked for that model."""
    if "Tree: " not in text:
        raise PromptError(
            "found neither `model` nor `adapter_path`, and the bundled model knows only questions "
            "about trees, such as examples/tree.txt: give `adapter_path`, or `model`"
        )


def check_unmerged(k: int | None, model: str) -> None:
    """Refuses a merge factor where there is no adapter."""
    if k not in (None, 1):
        raise AdapterError(without_encoder(f"`k` is {k}", model))


def _resolve(
    name: str, model: str | None, folders: AdapterFolders | None, revision: str | None = None
) -> Path:
    """The folder of a base, which the ``model`` of a command names, or else the adapters."""
    try:
        return base.resolve(name, revision)
    except ModelError as error:
        if model is not None:
            raise
        hint = f"({folders.name} names this base; `model` gives another)"
        raise ModelError(f"{error} {hint}") from error


def _look_up(
    model: str | None, adapter_path: str | Path | None, revision: str | None = None
) -> tuple[str, Path | None, AdapterFolders | None]:
    """The base's name, its folder where that had to be opened, and the adapters."""
    if adapter_path is None and model in (None, BUNDLED):
        model = adapter_path = BUNDLED
    path = None
    if adapter_path is None:
        path = base.resolve(model, revision)
        adapter_path = carried_by(path)
    folders = None if adapter_path is None else look_up(adapter_path)
    name = model if model is not None else folders.base
    if name is None:
        raise ModelError(f"{adapter_path} does not name its base model: give `model`")
    return name, path, folders
