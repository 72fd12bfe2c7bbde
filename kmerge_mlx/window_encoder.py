"""The window encoder: a language model that reads N tokens to a merged embedding, with context.

Tokens are cut into windows of W, which the encoder reads one by one. Its hidden states are pooled
in groups of N, and a projection makes each group an embedding of the model that answers.

Source: arXiv 2606.09659 (LCLM); docs/lclm.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import get_total_parameters, load_model

from kmerge_mlx import base
from kmerge_mlx.adapters.window import CONCAT, WindowConfig
from kmerge_mlx.encoder import Run
from kmerge_mlx.errors import AdapterError, first_line
from kmerge_mlx.files import check_memory

TOKENS_AT_ONCE = 4096
"""Most tokens that the encoder reads at once, unless one window has more."""

Window = tuple[Sequence[int], int, dict[int, bytes]]
"""A run of tokens, where in it the window begins, and the key of each group that is wanted."""


class Projection(nn.Module):
    """``fc2 gelu(fc1 rms_norm(x))``: pooled states ``(M, P)`` to embeddings ``(M, D)``."""

    def __init__(self, config: WindowConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.pooled_size, eps=1e-6)
        self.fc1 = nn.Linear(config.pooled_size, config.inner_size)
        self.fc2 = nn.Linear(config.inner_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.gelu(self.fc1(self.norm(x))))


class WindowEncoder:
    """Merges runs of tokens by windows.

    It is not an ``nn.Module``: whatever looks through the modules of the model that answers (for
    LoRA, for its embedding table) does not find the encoder's own.

    Args:
        config: Sizes.
        model: The language model that reads the tokens, as mlx-lm loads it, with its embedding
            table and final norm under ``model``.
        projection: Makes its pooled states embeddings.
        folder: Where the language model lies.
    """

    def __init__(
        self, config: WindowConfig, model: nn.Module, projection: Projection, folder: Path
    ):
        self.config, self.model, self.projection = config, model, projection
        self.folder = folder
        self.table_rows = base.table_rows(model)

    def parameters(self) -> dict[str, Any]:
        """All arrays, of both parts."""
        return {"model": self.model.parameters(), "projection": self.projection.parameters()}

    @property
    def num_parameters(self) -> int:
        """How many numbers both parts hold, packed or not."""
        return get_total_parameters(self.model) + get_total_parameters(self.projection)

    @property
    def dtype(self) -> mx.Dtype:
        """Of merged embeddings."""
        return self.projection.fc2.bias.dtype

    def keys(self, ids: Sequence[int], pad_token_id: int) -> list[bytes]:
        """A digest for each position of a run: of its window, up to the end of its group.

        That is all that the position depends on, because the encoder is causal. Nothing is padded.
        """
        n, found = self.config.merge_factor, []
        data = np.asarray(ids, np.int64)
        for start in range(0, len(data), self.config.window):
            before = min(start, self.config.overlap)
            digest = blake2b(np.int64(before).tobytes(), digest_size=16)
            digest.update(data[start - before : start].tobytes())
            window = data[start : start + self.config.window]
            for group in range(0, len(window), n):
                digest.update(window[group : group + n].tobytes())
                found.append(digest.copy().digest())
        return found

    def merge(
        self, table: nn.Module, runs: Iterable[Run], wanted: Collection[bytes]
    ) -> Iterator[tuple[list[bytes], mx.array]]:
        """Reads the windows of runs in which a position is wanted, a bounded batch at once.

        Args:
            table: The embedding table of the model that answers; not read.
            runs: Token ids and keys of each run.
            wanted: Keys, each of a position of these runs.

        Yields:
            Keys, and their merged embeddings ``(M, D)``.
        """
        left, groups = set(wanted), self.config.window // self.config.merge_factor
        batch: list[Window] = []
        longest = self.config.window + self.config.overlap
        at_once = max(1, TOKENS_AT_ONCE // longest)
        for ids, keys in runs:
            for start in range(0, len(keys), groups):
                mine = dict(enumerate(keys[start : start + groups]))
                mine = {group: key for group, key in mine.items() if key in left}
                left.difference_update(mine.values())
                if mine:
                    batch.append((ids, start * self.config.merge_factor, mine))
                if len(batch) == at_once:
                    yield self._read(batch)
                    batch = []
        if batch:
            yield self._read(batch)

    def _read(self, batch: Sequence[Window]) -> tuple[list[bytes], mx.array]:
        """Reads windows at once; the shorter ones end in padding, which nothing attends to."""
        config = self.config
        starts = [min(start, config.overlap) for _, start, _ in batch]
        windows = [
            np.asarray(run[start - before : start + config.window], np.int32)
            for (run, start, _), before in zip(batch, starts, strict=True)
        ]
        ids = np.zeros((len(windows), max(map(len, windows))), np.int32)
        for row, window in zip(ids, windows, strict=True):
            row[: len(window)] = window
        groups = [(row, group) for row, (*_, mine) in enumerate(batch) for group in mine]
        rows, numbers = np.array(groups, np.int32).T
        first = np.array(starts, np.int32)[rows] + numbers * config.merge_factor
        ends = np.array([len(window) for window in windows], np.int32)[rows]
        places = first[:, None] + np.arange(config.merge_factor, dtype=np.int32)  # (M, N)
        inside = places < ends[:, None]
        flat = np.where(inside, places, 0) + rows[:, None] * ids.shape[1]
        states = self.model.model(mx.array(ids))  # (B, T, E)
        pooled = self._pooled(states.reshape(-1, config.encoder_size)[mx.array(flat)], inside)
        return [key for *_, mine in batch for key in mine.values()], self.projection(pooled)

    def _pooled(self, states: mx.array, inside: np.ndarray) -> mx.array:
        """The states of groups ``(M, N, E)`` as one each; a short last group has fewer inside."""
        kept = mx.where(mx.array(inside)[..., None], states, 0)
        if self.config.pooling == CONCAT:
            return kept.reshape(len(kept), -1)
        counts = mx.array(inside.sum(axis=1, keepdims=True), mx.float32)
        return (kept.astype(mx.float32).sum(axis=1) / counts).astype(states.dtype)


def load(config: WindowConfig, folder: Path, projection: dict[str, mx.array]) -> WindowEncoder:
    """Loads the encoder in a folder of mlx-lm's, lazily, with the tensors of its projection.

    Raises:
        AdapterError: It cannot be loaded, or is of another width.
    """
    try:
        check_memory(folder.glob("model*.safetensors"), AdapterError)
        found = base.read_config(folder)
        config.check_reader(base.context_length(found))
        model, _ = load_model(folder, lazy=True, model_config=found)
        width = model.model(mx.array([[0]])).shape[-1]
    except base.LOAD_ERRORS as error:
        raise AdapterError(f"cannot load the encoder in {folder}: {first_line(error)}") from error
    if width != config.encoder_size:
        raise AdapterError(f"{folder} has hidden_size {width}, expected {config.encoder_size}")
    head = Projection(config)
    head.load_weights(list(projection.items()))
    model.eval()
    return WindowEncoder(config, model, head, folder)
