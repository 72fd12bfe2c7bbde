"""The order of training: every example once an epoch, from any place on as from the beginning."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.train.dataset import num_positions
from kmerge_mlx.train.rows import WINDOW, Place, Rows, by_length, make_batch, shuffled

K, B = 4, 3
SEED = (7, 0)


def examples(count: int) -> list[TokenizedExample]:
    """Prompts of many lengths, each with an id of its own."""
    return [TokenizedExample([Segment([i] * (1 + i * 37 % 101))], [i, 0]) for i in range(count)]


def epochs(count: int, number: int) -> list[list[Rows]]:
    per_epoch = count // B
    batches = list(islice(shuffled(examples(count), B, K, SEED, Place()), number * per_epoch))
    return [batches[i * per_epoch : (i + 1) * per_epoch] for i in range(number)]


@pytest.mark.parametrize("count", [3, 5, 3 * WINDOW, 3 * WINDOW + 1, 3 * WINDOW * 2 + 5])
def test_an_epoch_reads_each_example_at_most_once_and_leaves_less_than_a_batch(count):
    data = examples(count)
    for epoch in epochs(count, 3):
        read = [i for rows in epoch for i in rows.indices]
        assert len(set(read)) == len(read) == count - count % B
        assert all(len(rows.indices) == B for rows in epoch)
        assert all(rows.examples == [data[i] for i in rows.indices] for rows in epoch)


def test_each_epoch_has_an_order_of_its_own_and_reads_what_another_leaves_over():
    found = epochs(101, 8)
    left = [set(range(101)) - {i for rows in epoch for i in rows.indices} for epoch in found]
    assert all(len(part) == 2 for part in left)
    assert len(set().union(*left)) > 4
    assert len({str([rows.indices for rows in epoch]) for epoch in found}) == 8


def test_the_order_of_a_seed_never_changes():
    """Written down: a run must go on with a newer release, and numpy, as it began."""
    first = [rows.indices for rows in islice(shuffled(examples(20), B, K, SEED, Place()), 3)]
    assert first == [[5, 16, 19], [1, 12, 4], [11, 3, 14]]


@pytest.mark.parametrize("count", [10, 100])
def test_from_any_place_on_the_batches_are_those_from_the_beginning(count):
    data = examples(count)
    whole = list(islice(shuffled(data, B, K, SEED, Place()), 3 * (count // B)))
    for read, rows in enumerate(whole[:-2], 1):
        rest = list(islice(shuffled(data, B, K, SEED, rows.place), 2))
        assert rest == whole[read : read + 2]


def test_the_examples_of_a_batch_are_of_similar_length():
    def spread(batches: list[list[TokenizedExample]]) -> float:
        lengths = [[len(example.prompt_ids) for example in batch] for batch in batches]
        return sum(max(part) - min(part) for part in lengths) / len(lengths)

    data = examples(B * WINDOW)
    unsorted = [data[i : i + B] for i in range(0, len(data), B)]
    assert spread([rows.examples for rows in epochs(len(data), 1)[0]]) < spread(unsorted) / 5


@pytest.mark.parametrize("count", [1, 3, 10])
def test_validation_reads_every_example_once_the_shortest_first(count):
    data = examples(count)
    batches = by_length(data, B, K)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert [len(batch) for batch in batches[:-1]] == [B] * (len(batches) - 1)
    lengths = [-(-len(data[i].prompt_ids) // K) for batch in batches for i in batch]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("answers", [(2, 2), (2, 40), (20, 400)])
def test_a_step_is_traced_for_few_shapes_and_little_is_padding(answers):
    """Lengths spread as those of reviews, questions and commits are: long tails."""
    drawn, size = random.Random(1), 8

    def example() -> TokenizedExample:
        context = min(600, int(drawn.lognormvariate(4.8, 0.7)) + 32)
        ids = [drawn.randrange(900) for _ in range(context)]
        segments = [Segment([1] * 20, False), Segment(ids), Segment([2] * 12, False)]
        return TokenizedExample(segments, [3] * drawn.randint(*answers))

    data, shapes, real, padded = [example() for _ in range(1600)], set(), 0, 0
    for rows in islice(shuffled(data, size, 2, SEED, Place()), 1000):
        batch = make_batch(rows.examples, 2, 0, 1000)
        shapes.add((*batch.ids.shape, batch.blocks.shape[0], batch.targets.size))
        real += sum(num_positions(e, 2) - 1 for e in rows.examples)
        padded += batch.ids.size
    assert len(shapes) <= 90
    assert 1 - real / padded < 0.13
