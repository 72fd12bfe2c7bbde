"""Reads a language model of a checkpoint, and writes it as a model folder, a shard at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import make_shards

from kmerge_mlx import base
from kmerge_mlx.adapters.lora import tensor_problems
from kmerge_mlx.convert.marked_tokenizer import write_text
from kmerge_mlx.errors import CheckpointError, KMergeError, first_line
from kmerge_mlx.files import read_safetensors, write_safetensors

SHARD_GB = 1  # of weights, in memory at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LanguageModel:
    """A language model: its folder, its config, and its weights, not read yet."""

    folder: Path
    config: dict[str, Any]
    model: nn.Module

    @classmethod
    def read(cls, folder: Path, prefix: str, problems: list[str]) -> LanguageModel | None:
        """Reads a folder whose tensors' names lack ``prefix``; what is wrong joins the problems."""
        try:
            files = sorted(folder.glob("model*.safetensors"))
            if not files or not (folder / "config.json").exists():
                raise CheckpointError(
                    f"{folder} holds no config.json with model*.safetensors: not a model of LCLM"
                )
            config = base.read_config(folder)
            if config.get("model_file") is not None:
                raise CheckpointError(f"{folder} brings a `model_file` of its own: not supported")
            if config.get("quantization") or config.get("quantization_config"):
                raise CheckpointError(f"{folder} is quantized: give floating-point weights")
            if prefix:
                config["tie_word_embeddings"] = True  # it has no head
            model = base.skeleton(config)
            weights: dict[str, mx.array] = {}
            for file in files:
                weights |= read_safetensors(file, CheckpointError)
            weights = {f"{prefix}{name}": array for name, array in weights.items()}
            if hasattr(model, "sanitize"):
                weights = model.sanitize(weights)
        except KMergeError as error:
            problems.append(str(error))
            return None
        except base.LOAD_ERRORS as error:
            problems.append(f"cannot read {folder}: {first_line(error)}")
            return None
        expected = dict(tree_flatten(model.parameters()))
        wrong = tensor_problems(expected, weights)
        problems += [f"{folder.name}: {problem}" for problem in wrong]
        if wrong:
            return None
        model.load_weights(list(weights.items()))
        return cls(folder, config, model)

    @property
    def width(self) -> int:
        """The width of its hidden states."""
        return base.text_config(self.config)["hidden_size"]

    def uneven(self, size: int) -> str | None:
        """How many of its matrices cannot be packed in groups of ``size``, if any, in words."""
        found = [m for _, m in self.model.named_modules() if hasattr(m, "to_quantized")]
        count = sum(bool(module.weight.shape[-1] % size) for module in found)
        if not count:
            return None
        share = f"{count} of the {self.folder.name}'s {len(found)} matrices"
        return f"{share} are not packed: groups of {size} do not divide their rows"

    def write(
        self, folder: Path, dtype: mx.Dtype | None, bits: int | None, size: int, wrote: Progress
    ) -> None:
        """Writes a model folder as mlx-lm loads it; the model is empty afterwards.

        mlx-lm's own writer holds 5 GB of weights at once.
        """
        model, config = self.model, self.config
        if dtype is not None:
            model.set_dtype(dtype)
            config = config | {"dtype": base.dtype_name(dtype)}
        if bits is not None:
            model, config = base.quantized(model, config, size, bits)
            if not base.has_quantized_layers(model):
                found = f"no layer in {self.folder.name} has rows that groups of {size} divide"
                raise CheckpointError(f"{found}: give another `q_group_size`, or no bits")
        weights = dict(tree_flatten(model.parameters()))
        total, whole = sum(array.nbytes for array in weights.values()), len(weights)
        shards = make_shards(weights, SHARD_GB)
        weights.clear()
        model.update(tree_map(lambda _: mx.array([]), model.parameters()))
        folder.mkdir(exist_ok=True)
        places, done = {}, 0
        for i in range(len(shards)):
            shard, shards[i] = shards[i], None
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            for at, array in shard.items():  # one by one: what it is made of is freed at once
                mx.eval(array)
                self._check_finite(at, array)
                done += 1
                wrote(done, whole)
            write_safetensors(folder / name, shard)
            places |= dict.fromkeys(shard, name)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
        write_text(folder / "config.json", json.dumps(config, indent=2))

    def _check_finite(self, name: str, array: mx.array) -> None:
        """Refuses a tensor that is not of numbers; NaN is its own largest number to MLX."""
        if not mx.issubdtype(array.dtype, mx.floating):
            return
        if not mx.isfinite(mx.stack([array.max(), array.min()])).all().item():
            found = f"{self.folder.name}: {name} holds NaN or infinite values"
            raise CheckpointError(f"{found}: the training run diverged")
