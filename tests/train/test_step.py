"""Optimizers and schedules by mlx-lm's names, and a step: one norm, and no wait for the device."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx.errors import TrainError
from kmerge_mlx.train.loss import answer_loss
from kmerge_mlx.train.ranks import Ranks
from kmerge_mlx.train.rows import Batch, make_batch
from kmerge_mlx.train.settings import OPTIMIZERS, TrainSettings
from kmerge_mlx.train.step import Stepper, make_optimizer, refill
from tests.cli_runner import assert_one_error
from tests.train.test_loss import PAD, V, examples, model_of
from tests.train_runs import SMALL_TREES, log_of, train, trained


def model() -> nn.Module:
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def gradients_of(layers: nn.Module, step: int):
    x = mx.arange(12, dtype=mx.float32).reshape(3, 4) / (step + 7)
    return nn.value_and_grad(layers, lambda m: (m(x) ** 2).mean())(layers)[1]


def after(layers: nn.Module, optimizer: optim.Optimizer, steps: range) -> dict[str, mx.array]:
    for step in steps:
        optimizer.update(layers, gradients_of(layers, step))
        mx.eval(layers.parameters(), optimizer.state)
    return dict(tree_flatten(layers.parameters()))


def equal(one: dict[str, mx.array], two: dict[str, mx.array]) -> bool:
    return set(one) == set(two) and all(mx.array_equal(one[n], two[n]).item() for n in one)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on_as_if_nothing_had_been_saved(tmp_path, name):
    schedule = {"name": "cosine_decay", "arguments": [1e-2, 10], "warmup": 2}
    config = TrainSettings(optimizer=name, lr_schedule=schedule)
    layers, optimizer = model(), make_optimizer(config)
    optimizer.init(layers.trainable_parameters())
    after(layers, optimizer, range(3))
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(optimizer.state)))
    weights = [(n, mx.array(a)) for n, a in tree_flatten(layers.parameters())]
    wanted = after(layers, optimizer, range(3, 6))

    other, again = model(), make_optimizer(config)
    other.load_weights(weights)
    again.init(other.trainable_parameters())
    saved = mx.load(str(tmp_path / "state.safetensors"))
    again.state = refill(again.state, saved)
    assert equal(after(other, again, range(3, 6)), wanted)


def rates(schedule: dict, count: int) -> list[float]:
    """The learning rate of each update."""
    optimizer, layers, found = make_optimizer(TrainSettings(lr_schedule=schedule)), model(), []
    for step in range(count):
        after(layers, optimizer, range(step, step + 1))
        found.append(optimizer.learning_rate.item())
    return found


def test_a_schedule_is_mlx_lms_with_its_warmup():
    found = rates({"name": "cosine_decay", "arguments": [1e-2, 10], "warmup": 4}, 12)
    # MLX joins the two after warmup + 1 updates, and counts the second from there.
    wanted = [1e-2 * step / 4 for step in range(5)]
    wanted += [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(7)]
    assert found == pytest.approx(wanted, abs=1e-7)


@pytest.mark.slow
def test_the_schedule_beats_the_learning_rate_and_counts_updates(tmp_path):
    yaml = "lr_schedule: {name: linear_schedule, arguments: [1.0e-3, 0, 4]}\n"
    options = ("--iters", 6, "--grad-accumulation-steps", 2, "--steps-per-report", 2)
    trained(tmp_path / "run", *SMALL_TREES, *options, yaml=yaml)
    found = [rate for _, rate in log_of(tmp_path / "run", "learning_rate")]
    assert found == pytest.approx([1e-3, 0.75e-3, 0.5e-3])


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Muon", "SGD", "Adafactor"])
def test_a_compiled_update_is_that_of_mlxs_optimizer_with_its_defaults(name):
    """No bias: Adafactor's every shape takes seconds of MLX's compiler on a CPU."""

    def layer() -> nn.Module:
        mx.random.seed(0)
        return nn.Linear(4, 4, bias=False)

    def loss(module: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
        return (module(batch.weights) ** 2).sum(), mx.array(2.0)

    def plain(module: nn.Module) -> mx.array:
        return (module(x) ** 2).sum() / 2

    x = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    batch = Batch(*[mx.zeros(1)] * 4, weights=x)
    settings = TrainSettings(optimizer=name.lower(), learning_rate=1e-2)
    module, optimizer = layer(), make_optimizer(settings)
    optimizer.init(module.trainable_parameters())
    stepper = Stepper(module, optimizer, loss, 0.0, Ranks())
    other, again = layer(), getattr(optim, name)(1e-2)
    for _ in range(3):
        stepper.update(stepper.add(batch, None))
        again.update(other, nn.value_and_grad(other, plain)(other)[1])
    assert mx.abs(module.weight - other.weight).max().item() < 1e-5
    assert mx.abs(module.weight - layer().weight).max().item() > 1e-3


def test_arguments_that_cannot_be_are_one_line_before_anything_is_written(tmp_path):
    decay = {"name": "cosine_decay"}
    for config, said in (
        ({"lion": {}}, "optimizer_config names 'lion', expected one of adam, "),
        ({"adamw": {"nope": 1}}, "optimizer_config.adamw is {'nope': 1}: "),
        ({"adamw": {"weight_decay": "x"}}, "optimizer_config.adamw is {'weight_d"),
    ):
        assert refused(optimizer_config=config).startswith(said)
    for schedule, said in (
        ({}, "lr_schedule is {}, expected a name (cosine_decay, "),
        (decay, "a list of arguments"),
        (decay | {"arguments": [1, 0]}, "must be greater than 0"),
        (decay | {"arguments": [math.nan, 9]}, "it gives no number"),
    ):
        assert said in refused(lr_schedule=schedule)
    result = train(tmp_path / "run", *SMALL_TREES, yaml="lr_schedule: {}")
    assert_one_error(result, 1, "lr_schedule is {}")
    assert not (tmp_path / "run").exists()


def refused(**settings: object) -> str:
    with pytest.raises(TrainError) as caught:
        make_optimizer(TrainSettings.of(settings))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def stepper_of(max_grad_norm=0.0):
    """SGD: its update is the gradient itself, so gradients can be read off the weights."""
    model, optimizer = model_of(True), optim.SGD(0.1)
    optimizer.init(model.trainable_parameters())
    return model, Stepper(model, optimizer, answer_loss, max_grad_norm, Ranks())


def weights(model):
    return {name: mx.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def test_gradients_are_clipped_by_their_global_norm():
    batch = make_batch(examples(), 3, PAD, V)
    free, loose = stepper_of()
    held, tight = stepper_of(max_grad_norm=0.5)
    before = weights(free)
    told = loose.update(loose.add(batch, None))[2].item()
    tight.update(tight.add(batch, None))
    gradients, clipped = (
        {name: before[name] - array for name, array in weights(model).items()}
        for model in (free, held)
    )
    norm = mx.sqrt(sum((g**2).sum() for g in gradients.values())).item() / 0.1
    assert norm > 0.5
    assert told == pytest.approx(norm, rel=1e-3)
    for name, gradient in gradients.items():
        assert mx.allclose(clipped[name], gradient * (0.5 / norm), rtol=1e-3, atol=1e-6), name


def test_nothing_is_read_off_the_device_during_a_step(monkeypatch):
    """A step that waits for the device leaves it idle while the next batch is made."""
    _, stepper = stepper_of()
    batches = [make_batch(examples(4, seed), 3, PAD, V) for seed in range(2)]

    def wait(*arrays):
        raise AssertionError("the step waited")

    monkeypatch.setattr(mx, "eval", wait)
    stepper.update(stepper.add(batches[1], stepper.add(batches[0], None)))
