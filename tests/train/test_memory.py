"""What a step reads at once is bounded, and its gradients are those of the whole batch."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map

from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.train import rows, step
from kmerge_mlx.train.loss import answer_loss, recomputing
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import MOST_POSITIONS, Batch, in_parts, make_batch
from kmerge_mlx.train.step import Stepper
from tests.tiny import PAD
from tests.train.test_loss import V, examples, model_of

K = 3


def row_of(positions: int) -> TokenizedExample:
    return TokenizedExample([Segment([1] * (positions - 2), False)], [2, 0])


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([100] * 4, [4]),
        ([512] * 4, [2, 2]),
        ([300] * 7, [2, 2, 2, 1]),
        ([20, 600, 1000], [1, 1, 1]),
        ([3000, 3000], [1, 1]),
    ],
)
def test_a_batch_is_read_in_parts_of_bounded_size(lengths, sizes):
    given = [row_of(length) for length in lengths]
    parts = list(in_parts(range(len(given)), given, K))
    assert [len(indices) for indices, _ in parts] == sizes
    assert [i for indices, _ in parts for i in indices] == list(range(len(given)))
    assert [row for _, found in parts for row in found] == given
    for _, found in parts:
        batch = make_batch(found, K, PAD, V)
        assert batch.ids.size <= MOST_POSITIONS or len(found) == 1


def gradients_of(parts: list[list[TokenizedExample]]) -> dict[str, mx.array]:
    model = model_of(True)
    optimizer = optim.SGD(0.1)
    optimizer.init(model.trainable_parameters())
    stepper, totals = Stepper(model, optimizer, answer_loss, 0.0, Ranks()), None
    for part in parts:
        totals = stepper.add(make_batch(part, K, PAD, V), totals)
    return dict(tree_flatten(totals))


def test_parts_and_recomputed_rows_add_up_to_the_whole_batch(monkeypatch):
    given = examples(6)
    whole = gradients_of([given])
    monkeypatch.setattr(rows, "MOST_POSITIONS", 32)
    parts = [[*found] for _, found in in_parts(range(6), given, K)]
    assert len(parts) > 2
    split = gradients_of(parts)
    monkeypatch.setattr(step, "MOST_POSITIONS", 1)  # all are too long
    recomputed = gradients_of(parts)
    assert whole["tokens"] == split["tokens"] == recomputed["tokens"]
    for name, array in whole.items():
        for other in (split[name], recomputed[name]):
            # Sums in another order: their error is that of the largest numbers in them.
            gap = mx.abs(array - other).max().item() / mx.abs(array).max().item()
            assert gap < 1e-5, (name, gap)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dropout(mx.tanh(self.linear(x)))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Layer(), Layer()]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def test_recomputed_activations_have_the_dropout_of_the_way_forward():
    """The oracle is the slope of the loss, along its own gradient."""
    mx.random.seed(1)
    model, x = Stack(), mx.random.normal((4, 8))
    model.train()
    before = model.trainable_parameters()

    def loss(model: nn.Module, _: object) -> tuple[mx.array, mx.array]:
        return (model(x) ** 2).sum(), mx.array(1.0)

    def at(far: float) -> float:
        model.update(tree_map(lambda weight, g: weight + far * g, before, gradient))
        mx.random.seed(5)
        return recomputing(loss)(model, None)[0].item()

    mx.random.seed(5)
    _, gradient = nn.value_and_grad(model, recomputing(loss))(model, None)
    mx.eval(gradient)
    norm = sum((g**2).sum() for _, g in tree_flatten(gradient)).item()
    assert (at(1e-3) - at(-1e-3)) / 2e-3 == pytest.approx(norm, rel=1e-2)


def test_every_recomputed_batch_has_a_dropout_of_its_own():
    x = mx.random.normal((4, 8), key=mx.random.key(1))

    def loss(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
        return (model(batch.weights) ** 2).sum(), mx.array(1.0)

    def losses() -> list[float]:
        mx.random.seed(1)
        model, optimizer = Stack(), optim.SGD(0.0)
        model.train()
        optimizer.init(model.trainable_parameters())
        stepper = Stepper(model, optimizer, loss, 0.0, Ranks(), grad_checkpoint=True)
        batch = Batch(*[mx.zeros(1)] * 4, weights=x)
        return [stepper.add(batch, None)["loss"].item() for _ in range(4)]

    first = losses()
    assert len(set(first)) == 4
    assert losses() == first


def test_a_batch_in_parts_takes_little_more_memory_than_one_of_its_rows():
    given = [row_of(900)] * 6

    def peak(parts: list[list[TokenizedExample]]) -> int:
        model = model_of(True)
        mx.eval(model.parameters())
        mx.clear_cache()
        mx.reset_peak_memory()
        before, totals = mx.get_active_memory(), None
        optimizer = optim.SGD(0.1)
        optimizer.init(model.trainable_parameters())
        stepper = Stepper(model, optimizer, answer_loss, 0.0, Ranks())
        for part in parts:
            totals = stepper.add(make_batch(part, K, PAD, V), totals)
            mx.eval(totals)
        return mx.get_peak_memory() - before

    one = peak([given[:1]])
    assert peak([[*found] for _, found in in_parts(range(6), given, K)]) < 1.5 * one
    assert peak([given]) > 4 * one
