"""The optimizer and learning-rate schedule that a config names, and their state as tensors.

Owns: mlx-lm's names and YAML schema for both, turned into MLX's classes. Does not know models.

Source: ``mlx_lm.lora`` (``optimizer``, ``optimizer_config``), ``mlx_lm.tuner.utils.build_schedule``
(``lr_schedule``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tuner.utils import build_schedule

from kmerge_mlx.config import is_number
from kmerge_mlx.errors import TrainError, first_line, short
from kmerge_mlx.train.settings import OPTIMIZERS, TrainSettings

_CLASSES = dict(
    zip(OPTIMIZERS, (optim.Adam, optim.AdamW, optim.Muon, optim.SGD, optim.Adafactor), strict=True)
)
_SCHEDULES = ("cosine_decay", "exponential_decay", "linear_schedule", "step_decay")


def make_optimizer(config: TrainSettings) -> optim.Optimizer:
    """Makes the optimizer of a run, its state not initialised yet.

    Raises:
        TrainError: Arguments that the optimizer or the schedule does not take.
    """
    unknown = sorted(set(config.optimizer_config) - set(OPTIMIZERS))
    if unknown:
        raise TrainError(
            f"optimizer_config names {short(unknown[0])}, expected one of {', '.join(OPTIMIZERS)}"
        )
    arguments = config.optimizer_config.get(config.optimizer) or {}
    rate = config.learning_rate if config.lr_schedule is None else _schedule(config.lr_schedule)
    try:
        _try(_CLASSES[config.optimizer](learning_rate=rate, **arguments))
        return _CLASSES[config.optimizer](learning_rate=rate, **arguments)
    except (TypeError, ValueError) as error:
        where = f"optimizer_config.{config.optimizer}"
        raise TrainError(f"{where} is {short(arguments)}: {first_line(error)}") from error


def state_tensors(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The state of an optimizer, by flat names."""
    return dict(tree_flatten(optimizer.state))


def load_state(
    optimizer: optim.Optimizer, model: nn.Module, tensors: dict[str, mx.array] | None = None
) -> None:
    """Initialises an optimizer for what a model trains, and gives it a saved state.

    Args:
        optimizer: Fresh from :func:`make_optimizer`.
        model: Its trainable parameters are the optimizer's.
        tensors: From :func:`state_tensors`, or None to begin anew.

    Raises:
        TrainError: The state is another optimizer's, or of other parameters.
    """
    optimizer.init(model.trainable_parameters())
    if tensors is None:
        return
    fresh = {name: array.shape for name, array in state_tensors(optimizer).items()}
    saved = {name: array.shape for name, array in tensors.items()}
    if wrong := sorted(name for name in {**fresh, **saved} if fresh.get(name) != saved.get(name)):
        raise TrainError(
            f"the saved optimizer does not fit this run ({wrong[0]} and {len(wrong) - 1} more): "
            "start anew in another --adapter-path"
        )
    optimizer.state = refill(optimizer.state, tensors)


def refill(tree: Any, tensors: dict[str, mx.array]) -> Any:
    """A tree of the same form, its arrays taken by flat name; its empty branches stay."""
    return tree_map_with_path(lambda name, _: tensors[name], tree)


def _try(optimizer: optim.Optimizer) -> None:
    """Updates something: MLX takes most arguments unseen, and would fail at the first step."""
    weights = {"matrix": mx.ones((2, 2)), "vector": mx.ones(2)}
    mx.eval(optimizer.apply_gradients(weights, weights))


def _schedule(entry: dict[str, Any]) -> Callable[[mx.array], mx.array]:
    known = {"name", "arguments", "warmup", "warmup_init"}
    if unknown := sorted(map(str, set(entry) - known)):
        raise TrainError(f"lr_schedule: unknown {short(unknown[0])}, expected {sorted(known)}")
    if entry.get("name") not in _SCHEDULES or not isinstance(entry.get("arguments"), list):
        raise TrainError(
            f"lr_schedule is {short(entry)}, expected a name ({', '.join(_SCHEDULES)}) and a list "
            "of arguments"
        )
    try:
        schedule = build_schedule(entry)
        if not is_number(schedule(mx.array(1)).item()):
            raise TypeError("it gives no number")
    except (TypeError, ValueError, IndexError) as error:
        raise TrainError(f"lr_schedule {short(entry)}: {first_line(error)}") from error
    return schedule
