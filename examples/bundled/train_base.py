"""Trains the bundled base model, a tiny Qwen2 that answers questions about trees, from scratch.

    python examples/bundled/train_base.py --out /tmp/base --steps 4000

Owns: the model's shape and start, the optimizer step, the growing trees, what is saved and resumed.
Does not know merging: the adapters are trained on what this writes.

Source: DESIGN section 7, "From scratch on trees". One CPU thread is enough; preload OpenBLAS (see
the README). The folder loads with ``mlx_lm.load``; its ``training/`` is for ``--resume`` alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
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
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen2

from kmerge_mlx.config import DATA_SEED
from kmerge_mlx.files import replacing_folder, write_json, write_safetensors

WARMUP, LAST_RATE = 100, 0.02
GROW_AT = 0.9  # balanced accuracy at which trees get one node more


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        steps: Optimizer steps, over which the cosine falls to 2% of the rate.
        seed: Of the weights.
        data_seed: Of the trees.
        trees: Trees a step; each is asked 8 questions.
        learning_rate: The highest.
        eval_every: Steps between validations.
        eval_trees: Trees asked, each 3 questions.
        newlines_from: Step from which a tree's lines have ends.
    """

    steps: int = 4000
    seed: int = 0
    data_seed: int = DATA_SEED
    trees: int = 32
    learning_rate: float = 2e-3
    eval_every: int = 50
    eval_trees: int = 128
    newlines_from: int = 1500


def model_config(vocab_size: int, eos_token_id: int) -> dict[str, Any]:
    """The model's config.json, for mlx-lm and for transformers."""
    theta = 1e5
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        # mlx-lm reads the first, transformers 5 the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
    }


def build_model(config: dict[str, Any], seed: int) -> qwen2.Model:
    """A model with a *mimetic* start.

    In every other head queries and keys are one random orthonormal projection, so that a token
    attends to its equals before anything is learned; what is read is written back through the
    transpose of the projection that read it. Without this, training stays at chance for 900 to
    2,000 steps (DESIGN section 7).
    """
    mx.random.seed(seed)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    size, heads = config["hidden_size"], config["num_attention_heads"]
    head_size = size // heads
    embed = model.model.embed_tokens
    embed.weight = 0.1 * mx.random.normal(embed.weight.shape)
    for layer in model.layers:
        attention = layer.self_attn
        pair = orthonormal(size)
        attention.v_proj.weight, attention.o_proj.weight = 0.7 * pair, 0.7 * pair.T
        for head in range(0, heads, 2):
            rows = slice(head * head_size, (head + 1) * head_size)
            projection = orthonormal(size)[:head_size]
            attention.q_proj.weight[rows] = projection
            attention.k_proj.weight[rows] = projection
        for projected in (attention.q_proj, attention.k_proj, attention.v_proj):
            projected.bias = mx.zeros_like(projected.bias)
    mx.eval(model.parameters())
    return model


def orthonormal(size: int) -> mx.array:
    """A random orthonormal matrix ``(size, size)``."""
    return mx.linalg.qr(mx.random.normal((size, size)), stream=mx.cpu)[0]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warm-up, then a cosine over all steps down to 2%."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
    scale = min(1.0, (step + 1) / WARMUP) * (LAST_RATE + (1 - LAST_RATE) * cosine)
    return recipe.learning_rate * scale


class Trainer:
    """The model, its optimizer and where training stands.

    Args:
        recipe: How to train.
        folder: Where to save, and what to resume from.
    """

    def __init__(self, recipe: Recipe, folder: Path, config: dict[str, Any] | None = None):
        self.recipe, self.folder = recipe, folder
        self.tokenizer = vocabulary.build()
        vocab_size = self.tokenizer.get_vocab_size()
        eos = self.tokenizer.token_to_id(vocabulary.EOS)
        self.config = model_config(vocab_size, eos) | (config or {})
        self.make = tree_rows.RowMaker(self.tokenizer)
        self.held_out = tree_rows.held_out_trees(recipe.data_seed)
        self.model = build_model(self.config, recipe.seed)
        self.optimizer = optim.AdamW(recipe.learning_rate, betas=[0.9, 0.98], bias_correction=True)
        self.optimizer.init(self.model.trainable_parameters())
        self.step, self.nodes, self.seconds = 0, tree_rows.FIRST_NODES, 0.0
        self._compile()

    def _compile(self) -> None:
        model, optimizer = self.model, self.optimizer
        state = [model.state, optimizer.state]
        gradient = nn.value_and_grad(model, row_loss)

        @partial(mx.compile, inputs=state, outputs=state)
        def update(ids: mx.array, weights: mx.array, asked: mx.array) -> mx.array:
            loss, gradients = gradient(model, ids, weights, asked)
            optimizer.update(model, optim.clip_grad_norm(gradients, 1.0)[0])
            return loss

        self._update, self._state = update, state
        self._predict = mx.compile(lambda ids: model(ids).argmax(-1), inputs=model.state)

    def train(self) -> Iterator[dict[str, float]]:
        """Trains to the last step.

        Yields:
            At every validation: step, nodes, loss (mean since the last), scores, rate, seconds.
        """
        recipe, losses, started = self.recipe, [], time.perf_counter()
        rows = self._rows()
        while self.step < recipe.steps:
            rate = learning_rate(recipe, self.step)
            self.optimizer.learning_rate = rate
            loss = self._update(*map(mx.array, (rows.ids, rows.weights, rows.asked)))
            mx.async_eval(loss, self._state)
            self.step += 1
            rows = self._rows()  # drawn while the step runs
            losses.append(loss.item())
            if self.step % recipe.eval_every and self.step < recipe.steps:
                continue
            score = self.evaluate(tree_rows.shapes(self.nodes), recipe.eval_trees)
            self.seconds, started = (
                self.seconds + time.perf_counter() - started,
                time.perf_counter(),
            )
            yield {
                "step": self.step,
                "nodes": self.nodes,
                "loss": sum(losses) / len(losses),
                **score,
                "learning_rate": rate,
                "seconds": self.seconds,
            }
            losses = []
            if score["balanced_accuracy"] > GROW_AT and self.nodes < tree_rows.LAST_NODES:
                self.nodes += 1
                rows = self._rows()

    def _rows(self) -> tree_rows.Rows:
        recipe = self.recipe
        drawn = (recipe.trees, recipe.data_seed, self.held_out, self.newlines)
        return tree_rows.training_rows(self.make, self.nodes, self.step, *drawn)

    @property
    def newlines(self) -> bool:
        """Whether a tree's lines have ends by now."""
        return self.step >= self.recipe.newlines_from

    def evaluate(self, stages: Any, trees: int) -> dict[str, float]:
        """Scores on validation trees: see :func:`tree_rows.scores`."""
        questions = tree_rows.validation_questions(stages, trees, self.recipe.data_seed)
        rows = tree_rows.validation_rows(self.make, questions, self.newlines)
        predicted = np.zeros_like(rows.ids)
        size = min(len(questions), 96)
        for start in range(0, len(questions), size):
            start = min(start, len(questions) - size)  # one shape: the last chunk may overlap
            guess = self._predict(mx.array(rows.ids[start : start + size]))
            predicted[start : start + size, 1:] = np.array(guess)[:, :-1]
        return tree_rows.scores(questions, rows, predicted)

    def save(self) -> None:
        """Writes the model folder, whole or not at all."""
        weights = dict(tree_flatten(self.model.parameters()))
        optimizer = dict(tree_flatten(self.optimizer.state))
        stand = {"step": self.step, "nodes": self.nodes, "seconds": self.seconds}
        with replacing_folder(self.folder) as new:
            vocabulary.save(new)
            write_json(new / "config.json", self.config)
            write_safetensors(new / "model.safetensors", weights)
            (new / "training").mkdir()
            write_safetensors(new / "training" / "optimizer.safetensors", optimizer)
            write_json(new / "training" / "state.json", stand | {"recipe": asdict(self.recipe)})

    def resume(self) -> None:
        """Goes on where the folder was saved. Batches follow from the step alone."""
        stand = json.loads((self.folder / "training" / "state.json").read_text())
        self.step, self.nodes = stand["step"], stand["nodes"]
        self.seconds = stand["seconds"]
        self.model.load_weights(str(self.folder / "model.safetensors"))
        saved = mx.load(str(self.folder / "training" / "optimizer.safetensors"))
        self.optimizer.state = tree_unflatten(list(saved.items()))
        self._compile()


def row_loss(model: nn.Module, ids: mx.array, weights: mx.array, asked: mx.array) -> mx.array:
    """Weighted mean cross-entropy of each token given those before it.

    Args:
        model: The model.
        ids: ``(B, T)``.
        weights: ``(B, T)``, of each token as a target.
        asked: ``(B, T)``, the question each token belongs to, which sees itself and the tree (0).
    """
    asked, length = asked[:, None, :-1], ids.shape[1] - 1  # (B, 1, T - 1): alike for all heads
    seen = (asked[..., None, :] == 0) | (asked[..., None, :] == asked[..., :, None])
    mask = seen & mx.tri(length, dtype=mx.bool_)
    h = model.model.embed_tokens(ids[:, :-1])
    for layer in model.layers:
        h = layer(h, mask)
    logits = model.model.embed_tokens.as_linear(model.model.norm(h))
    losses = nn.losses.cross_entropy(logits, ids[:, 1:])
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def run(trainer: Trainer, save_every: int, report: Callable[[dict[str, float]], None]) -> None:
    """Trains, reports every validation, and saves every so many steps and at the end."""
    for record in trainer.train():
        report(record)
        if trainer.step % save_every == 0 or trainer.step == trainer.recipe.steps:
            trainer.save()


def log_to(path: Path, step: int) -> Callable[[dict[str, float]], None]:
    """Prints records and appends them to a JSONL file, whose lines past ``step`` are dropped."""
    lines = path.read_text().splitlines() if step and path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in kept))

    def report(record: dict[str, float]) -> None:
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
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--resume", action="store_true", help="go on from OUT")
    options = parser.parse_args()
    out = options.out.resolve()
    if out.exists() and not options.resume:
        parser.error(f"{out} exists: give --resume to go on with it, or choose another folder")
    trainer = Trainer(Recipe(options.steps, options.seed), out)
    if options.resume:
        trainer.resume()
    out.parent.mkdir(parents=True, exist_ok=True)
    run(trainer, options.save_every, log_to(out.with_name(f"{out.name}.jsonl"), trainer.step))
    final = trainer.evaluate(tree_rows.shapes(tree_rows.LAST_NODES)[:1], 500)
    print("medium, 500 held-out trees:", json.dumps(final))


if __name__ == "__main__":
    main()
