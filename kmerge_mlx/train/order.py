"""In which order examples are read: shuffled anew each epoch, batches of similar length.

Owns the order alone, as a function of a seed and of a place in it, so a resumed run goes on at the
next batch without any state but the place.

Source: mlx-lm sorts a whole dataset by length and shuffles its batches; here that is done within a
window of a few batches, so that batches differ from epoch to epoch and data may be drawn lazily.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.errors import DataError
from kmerge_mlx.train.dataset import num_positions

WINDOW = 16
"""Batches that are sorted by length together."""


@dataclass(frozen=True)
class Place:
    """How far a run has read.

    Args:
        epoch: From 0.
        batch: Batches of this epoch that have been read.
    """

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Rows:
    """The examples of one batch.

    Args:
        indices: Where they stand in the data.
        examples: What they are.
        place: Where the run stands when they have been read.
    """

    indices: list[int]
    examples: list[TokenizedExample]
    place: Place


def batches_of(examples: int, batch_size: int) -> int:
    """How many batches an epoch has.

    Raises:
        DataError: Fewer examples than a batch takes.
    """
    if examples < batch_size:
        raise DataError(
            f"found {examples} examples to train on, expected at least --batch-size {batch_size}"
        )
    return examples // batch_size


def shuffled(
    data: Sequence[TokenizedExample],
    batch_size: int,
    merge_factor: int,
    seed: Sequence[int],
    place: Place,
) -> Iterator[Rows]:
    """Batches without end, from a place on.

    The examples that an epoch has left over for no whole batch are others in every epoch.

    Args:
        data: All examples.
        batch_size: B.
        merge_factor: K, for the lengths.
        seed: The same one gives the same order.
        place: Where to begin.

    Raises:
        DataError: Fewer examples than a batch takes.
    """
    per_epoch = batches_of(len(data), batch_size)
    epoch, batch = place.epoch, place.batch
    while True:
        # RandomState's sequences are frozen; numpy may change those of its newer generators.
        order = np.random.RandomState([*seed, epoch]).permutation(len(data))
        while batch < per_epoch:
            first = batch - batch % WINDOW
            last = min(first + WINDOW, per_epoch)
            window = order[first * batch_size : last * batch_size].tolist()
            rng = np.random.RandomState([*seed, epoch, first])
            rows = _window(data, window, batch_size, merge_factor, rng)
            for indices, examples in rows[batch - first :]:
                batch += 1
                yield Rows(indices, examples, Place(epoch, batch))
        epoch, batch = epoch + 1, 0


def by_length(
    examples: Sequence[TokenizedExample], batch_size: int, merge_factor: int
) -> list[list[int]]:
    """Every example once, in batches of similar length, the last of which may be smaller.

    Args:
        examples: What to divide.
        batch_size: B.
        merge_factor: K, for the lengths.

    Returns:
        The indices of each batch.
    """
    lengths = [num_positions(example, merge_factor) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _window(
    data: Sequence[TokenizedExample],
    indices: list[int],
    batch_size: int,
    merge_factor: int,
    rng: np.random.RandomState,
) -> list[tuple[list[int], list[TokenizedExample]]]:
    examples = [data[i] for i in indices]
    return [
        ([indices[j] for j in batch], [examples[j] for j in batch])
        for batch in _permuted(by_length(examples, batch_size, merge_factor), rng)
    ]


def _permuted(batches: list[list[int]], rng: np.random.RandomState) -> list[list[int]]:
    return [batches[b] for b in rng.permutation(len(batches))]
