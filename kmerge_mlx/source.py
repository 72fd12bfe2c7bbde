"""Finds the base model and the adapter that names mean, once for a whole command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import adapter_folder, base_of, carried_by, read_merge_config
from kmerge_mlx.adapters.schema import MergeConfig
from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.errors import AdapterError, ModelError


@dataclass(frozen=True)
class Source:
    """A base model and an adapter, found on this machine.

    Args:
        model: What the base is called: a folder, a hub repo id, or ``bundled``.
        path: The base's folder.
        adapter_path: What the adapter is called, or None without one.
        adapter: The folder of the adapter for this K, or None.
        merge: What the adapter says of itself, or None.
        trust_remote_code: Let the base's own Python files run.
    """

    model: str
    path: Path
    adapter_path: str | None = None
    adapter: Path | None = None
    merge: MergeConfig | None = None
    trust_remote_code: bool = False

    @classmethod
    def find(
        cls,
        model: str | None = None,
        adapter_path: str | None = None,
        k: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        weights: bool = True,
    ) -> Source:
        """Finds both, downloading what is on the hub.

        Args:
            model: Base model, or None: the one the adapter names; without an adapter, the
                bundled model.
            adapter_path: Adapter folder, folder of them, hub repo id or ``bundled``; None: the
                one that the model's folder carries, if any.
            k: Merge factor, or None: the only one there is.
            trust_remote_code: Let the base's own Python files run.
            revision: Hub revision of the base, where its id names none.
            weights: Whether the base's weights are wanted too.

        Raises:
            ModelError: The adapter does not name its base, or the model cannot be found.
            AdapterError: No adapter, or no such K.
        """
        if adapter_path is None and model in (None, BUNDLED):
            model = adapter_path = BUNDLED
        if adapter_path is None:
            path = base.resolve(model, revision, weights)
            carried = carried_by(path)
            adapter_path = None if carried is None else str(carried)
        elif model is None and (model := base_of(adapter_path)) is None:
            raise ModelError(f"{adapter_path} does not name its base model: give `model`")
        else:
            path = None
        if adapter_path is None and k not in (None, 1):
            raise AdapterError(f"`k` is {k}, and there is no merge encoder: give `adapter_path`")
        folder = None if adapter_path is None else adapter_folder(adapter_path, k)
        merge = None if folder is None else read_merge_config(folder)
        path = base.resolve(model, revision, weights) if path is None else path
        return cls(model, path, adapter_path, folder, merge, trust_remote_code)

    @property
    def k(self) -> int:
        """The merge factor; 1 where nothing merges."""
        return 1 if self.merge is None else self.merge.merge_factor
