"""Trains the bundled base model, a tiny Qwen2 that answers questions about trees, from scratch.

    python examples/bundled/train_base.py --out /tmp/base

Owns: the phases of training, the optimizer step, the growing trees, what is saved and resumed.
Does not know merging: the adapters are trained on what this writes.

One CPU thread is enough; preload OpenBLAS (see the README). The folder loads with ``mlx_lm.load``;
its ``training/`` is for ``--resume`` alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import tokenizer as vocabulary
import tree_rows
from base_model import Base, model_config
from mlx.utils import tree_flatten, tree_map_with_path
from tree_rows import NODE_TOKENS

from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.files import replacing_folder, write_json, write_safetensors

LAST_RATE = 0.02
GROW_AT = 0.9  # balanced accuracy at which trees get one node more
VALIDATION_BATCH = 64

Arrays = tuple[mx.array, ...]
"""tree, asked, answers, places, tree_weights, asked_weights (see :class:`tree_rows.Rows`)."""


@dataclass(frozen=True)
class Phase:
    """A part of training, with an optimizer of its own.

    Args:
        name: ``packed``: all layers but the first learn to answer from codes, one after the other
            (trees of 20 nodes within 650 steps; with the codes four places apart, of 12 in 850,
            and with errors that stay); ``spread``: from codes in their own places, nothing between
            them; ``first``: the first layer learns to make codes of what its heads look at;
            ``all``: every layer learns to write the whole text.
        steps: Optimizer steps, over which the cosine falls to 2% of the rate.
        learning_rate: The highest.
        warmup: Steps up to it.
    """

    name: str
    steps: int
    learning_rate: float
    warmup: int

    def rate(self, step: int) -> float:
        """The learning rate at a step of this phase: warm-up, then a cosine."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        scale = min(1.0, (step + 1) / self.warmup) * (LAST_RATE + (1 - LAST_RATE) * cosine)
        return self.learning_rate * scale


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        phases: One after the other.
        seed: Of the weights.
        data_seed: Of the trees.
        trees: Trees a step; each is asked 8 questions.
        eval_every: Steps between validations.
        eval_trees: Trees asked, each 3 questions.
        last_nodes: Most nodes of a tree, at last.
    """

    phases: tuple[Phase, ...] = (
        Phase("packed", 1200, 2e-3, 100),
        Phase("spread", 300, 5e-4, 50),
        Phase("first", 300, 2e-3, 50),
        Phase("all", 800, 5e-4, 100),
    )
    seed: int = 0
    data_seed: int = DATA_SEED
    trees: int = 32
    eval_every: int = 25
    eval_trees: int = 128
    last_nodes: int = tree_rows.LAST_NODES


def answer_logits(base: Base, batch: Arrays, name: str) -> mx.array:
    """Logits ``(B, Q, P, V)`` of what comes after each place, read as in a phase."""
    tree, asked, answers, places, weights, _ = batch
    length, layers = tree.shape[1], base.model.layers
    if name in ("packed", "spread"):
        x, layers = base.codes(tree, asked, answers, places), layers[1:]
    else:
        x = base.embedded(tree, asked)
    if name == "packed":
        x, weights = base.packed(x, length, places), weights[:, NODE_TOKENS - 1 :: NODE_TOKENS]
    x = base.through(x, weights, asked.shape[1], layers)
    if name != "packed":
        x = base.packed(x, length, places)
    answered = x[:, length // NODE_TOKENS :]
    return base.logits(answered).reshape(*places.shape, -1)


def answer_loss(base: Base, batch: Arrays, name: str) -> mx.array:
    """Mean cross-entropy of the answers' tokens."""
    _, asked, answers, places, _, weights = batch
    after = places + 1
    targets = mx.take_along_axis(asked, after, axis=-1)
    weights = mx.take_along_axis(weights * answers, after, axis=-1)
    losses = nn.losses.cross_entropy(answer_logits(base, batch, name), targets)
    return (losses * weights).sum() / weights.sum()


def code_loss(base: Base, batch: Arrays) -> mx.array:
    """Mean squared distance of what the first layer writes from what the second should read.

    The tokens that hold something and those that hold nothing count the same, all in all.
    """
    tree, asked, answers, places, tree_weights, asked_weights = batch
    wanted = mx.stop_gradient(base.codes(tree, asked, answers, places))
    x = base.embedded(tree, asked)
    x = base.through(x, tree_weights, asked.shape[1], base.model.layers[:1])
    flat = asked_weights.reshape(len(tree), -1)
    real = mx.concatenate([tree_weights, flat], axis=1) > 0
    nothing = (wanted == base.nothing).all(axis=-1)
    distance, loss = ((x - wanted) ** 2).mean(axis=-1), mx.array(0.0)
    for part in (real & nothing, real & ~nothing):
        loss = loss + (distance * part).sum() / part.sum()
    return loss


def text_loss(base: Base, batch: Arrays) -> mx.array:
    """Weighted mean cross-entropy of each token given those before it."""
    tree, asked, _, _, tree_weights, asked_weights = batch
    length = tree.shape[1]
    x = base.embedded(tree, asked[..., :-1])
    x = base.through(x, tree_weights, asked.shape[1], base.model.layers)
    logits = base.logits(x)
    told = nn.losses.cross_entropy(logits[:, : length - 1], tree[:, 1:])
    told_weights = tree_weights[:, 1:] * (tree_weights[:, :-1] > 0)
    replied = logits[:, length:].reshape(*asked[..., :-1].shape, -1)
    answered = nn.losses.cross_entropy(replied, asked[..., 1:])
    total = (told * told_weights).sum() + (answered * asked_weights[..., 1:]).sum()
    return total / (told_weights.sum() + asked_weights[..., 1:].sum())


LOSSES = {
    "packed": partial(answer_loss, name="packed"),
    "spread": partial(answer_loss, name="spread"),
    "first": code_loss,
    "all": text_loss,
}


class Trainer:
    """The model, its optimizer and where training stands.

    Args:
        recipe: How to train.
        folder: Where to save, and what to resume from.
        config: What of the model's config to change.
    """

    def __init__(self, recipe: Recipe, folder: Path, config: dict[str, Any] | None = None):
        self.recipe, self.folder = recipe, folder
        self.tokenizer = vocabulary.build()
        vocab_size = self.tokenizer.get_vocab_size()
        eos = self.tokenizer.token_to_id(vocabulary.EOS)
        self.config = model_config(vocab_size, eos) | (config or {})
        self.make = tree_rows.RowMaker(self.tokenizer)
        self.held_out = tree_rows.held_out_trees(recipe.data_seed)
        self.base = Base(self.config, recipe.seed)
        self.step, self.nodes, self.seconds = 0, tree_rows.FIRST_NODES, 0.0
        self._begin()

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.recipe.phases)

    def _stand(self) -> tuple[Phase, int]:
        """The phase that the next step belongs to, and its step there; at the end, the last's."""
        start = 0
        for phase in self.recipe.phases:
            if self.step < start + phase.steps:
                break
            start += phase.steps
        else:
            start -= phase.steps
        return phase, self.step - start

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to; at the end, the last."""
        return self._stand()[0]

    def _begin(self) -> None:
        """Begins a phase: what is trained, a new optimizer, compiled functions."""
        base, (phase, step) = self.base, self._stand()
        first, *upper = base.model.layers
        inner = base.model.model
        base.freeze()
        trained = [*upper, inner.embed_tokens, inner.norm]
        for module in {"first": [first], "all": [base.model]}.get(phase.name, trained):
            module.unfreeze()
        if phase.name == "spread":
            base.unfreeze(keys="nothing", recurse=False)
        if phase.name == "first":
            if step == 0:
                base.aim(self.make.ends, self.make.tokens)
            # Where its heads look is right: they would soon look elsewhere.
            first.self_attn.q_proj.freeze()
            first.self_attn.k_proj.freeze()
        optimizer = optim.AdamW(phase.learning_rate, betas=[0.9, 0.98], bias_correction=True)
        optimizer.init(base.trainable_parameters())
        state = [base.state, optimizer.state]
        gradient = nn.value_and_grad(base, LOSSES[phase.name])

        @partial(mx.compile, inputs=state, outputs=state)
        def update(batch: Arrays) -> mx.array:
            loss, gradients = gradient(base, batch)
            optimizer.update(base, optim.clip_grad_norm(gradients, 1.0)[0])
            return loss

        self.optimizer, self._state, self._update = optimizer, state, update
        self._predict = mx.compile(
            lambda batch: answer_logits(base, batch, phase.name).argmax(-1), inputs=base.state
        )

    def train(self) -> Iterator[dict[str, Any]]:
        """Trains to the last step.

        Yields:
            At every validation: step, phase, nodes, loss (mean since the last), scores, rate,
            seconds.
        """
        recipe, losses, started = self.recipe, [], time.perf_counter()
        batch = self._batch()
        while self.step < self.steps:
            phase, step = self._stand()
            self.optimizer.learning_rate = rate = phase.rate(step)
            loss = self._update(batch)
            mx.async_eval(loss, self._state)
            self.step += 1
            batch = self._batch()  # drawn while the step runs
            losses.append(loss.item())
            ended = self.phase != phase or self.step == self.steps
            if self.step % recipe.eval_every and not ended:
                continue
            score = self.evaluate(tree_rows.shapes(self.nodes), recipe.eval_trees)
            if self.phase != phase:
                self._begin()
            self.seconds += time.perf_counter() - started
            started = time.perf_counter()
            loss = sum(losses) / len(losses)
            stand = {"step": self.step, "phase": phase.name, "nodes": self.nodes, "loss": loss}
            yield stand | score | {"learning_rate": rate, "seconds": self.seconds}
            losses = []
            if score["balanced_accuracy"] > GROW_AT and self.nodes < recipe.last_nodes:
                self.nodes += 1
                batch = self._batch()

    def _batch(self) -> Arrays:
        recipe = self.recipe
        drawn = (recipe.trees, recipe.data_seed, self.held_out)
        return arrays(tree_rows.training_rows(self.make, self.nodes, self.step, *drawn))

    def evaluate(self, stages: Sequence[Any], trees: int, split: str = "valid") -> dict[str, float]:
        """Scores on held-out trees: see :func:`tree_rows.scores`."""
        seed = self.recipe.data_seed
        rows = tree_rows.validation_rows(self.make, stages, trees, seed, split)
        predicted = np.zeros_like(rows.places)
        size = min(trees, VALIDATION_BATCH)
        for start in range(0, trees, size):
            start = min(start, trees - size)  # one shape: the last chunk may overlap
            part = slice(start, start + size)
            predicted[part] = np.array(self._predict(arrays(rows[part])))
        return tree_rows.scores(rows, predicted)

    def save(self) -> None:
        """Writes the model folder, whole or not at all."""
        stand = {"step": self.step, "nodes": self.nodes, "seconds": self.seconds}
        with replacing_folder(self.folder) as new:
            vocabulary.save(new)
            write_json(new / "config.json", self.config)
            weights = dict(tree_flatten(self.base.model.parameters()))
            write_safetensors(new / "model.safetensors", weights)
            (new / "training").mkdir()
            rest = {"nothing": self.base.nothing, **dict(tree_flatten(self.optimizer.state))}
            write_safetensors(new / "training" / "state.safetensors", rest)
            write_json(new / "training" / "state.json", stand | {"recipe": asdict(self.recipe)})

    def resume(self) -> None:
        """Goes on where the folder was saved. Batches follow from the step alone."""
        stand = json.loads((self.folder / "training" / "state.json").read_text())
        self.step, self.nodes = stand["step"], stand["nodes"]
        self.seconds = stand["seconds"]
        self.base.model.load_weights(str(self.folder / "model.safetensors"))
        saved = mx.load(str(self.folder / "training" / "state.safetensors"))
        self.base.nothing = saved.pop("nothing")
        self._begin()
        state = self.optimizer.state
        state.update(tree_map_with_path(lambda path, _: saved[path], state))


def arrays(rows: tree_rows.Rows) -> Arrays:
    """Rows as arrays."""
    weights = (rows.tree_weights, rows.asked_weights)
    return tuple(map(mx.array, (rows.tree, rows.asked, rows.answers, rows.places, *weights)))


def run(trainer: Trainer, save_every: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Trains, reports every validation, and saves every so many steps and at the end."""
    for record in trainer.train():
        report(record)
        if trainer.step % save_every == 0 or trainer.step == trainer.steps:
            trainer.save()


def log_to(path: Path, step: int) -> Callable[[dict[str, Any]], None]:
    """Prints records and appends them to a JSONL file, whose lines past ``step`` are dropped."""
    lines = path.read_text().splitlines() if step and path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept))

    def report(record: dict[str, Any]) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
        with path.open("a") as file:
            file.write(json.dumps(rounded) + "\n")
        print("  ".join(f"{k} {v}" for k, v in rounded.items()), flush=True)

    return report


def main() -> None:
    """Reads the options, trains, and scores the result on the paper's ``medium`` trees."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="model folder; its log is OUT.jsonl"
    )
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--resume", action="store_true", help="go on from OUT, if it is there")
    options = parser.parse_args()
    out = options.out.resolve()
    if out.exists() and not options.resume:
        parser.error(f"{out} exists: give --resume to go on with it, or choose another folder")
    trainer = Trainer(Recipe(seed=options.seed), out)
    if out.exists():
        trainer.resume()
    out.parent.mkdir(parents=True, exist_ok=True)
    run(trainer, options.save_every, log_to(out.with_name(f"{out.name}.jsonl"), trainer.step))
    for nodes, shape in ((10, 0), (20, 1)):
        final = trainer.evaluate(tree_rows.shapes(nodes)[shape : shape + 1], 500, "test")
        print(f"up to {nodes} nodes, 500 held-out trees:", json.dumps(final))


if __name__ == "__main__":
    main()
