"""Compares a checkpoint with the base model that the user names for it: names, shapes, copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import HEAD
from kmerge_mlx.adapters.schema import BaseModelConfig, MergeConfig
from kmerge_mlx.convert.names import place
from kmerge_mlx.convert.peft import NameRules, copies_of_base
from kmerge_mlx.errors import ModelError, first_line


@dataclass(frozen=True)
class Base:
    """A base model, of which the weights are read only where a checkpoint repeats some."""

    merge: MergeConfig  # what it says of the adapters for it: name, fingerprint, padding token
    config: dict[str, Any]

    @classmethod
    def read(cls, model: str) -> Base:
        """Reads a folder or hub repo; raises a ModelError."""
        path = base.resolve(model, weights=False)
        config = base.read_config(path)
        pad = base.default_pad_token_id(base.read_tokenizer(path, config, model))
        made_for = BaseModelConfig(model, base.fingerprint(config))
        return cls(MergeConfig(None, made_for, pad), config)

    def __str__(self) -> str:
        return f"`model` {self.merge.base.id}"

    @property
    def is_plain(self) -> bool:
        """Whether its weights are as they were trained, and mlx-lm alone can read them."""
        others = ("quantization", "quantization_config", "model_file")
        return all(self.config.get(name) is None for name in others)

    def lora_problems(
        self, weights: Mapping[str, mx.array], config: Mapping[str, Any]
    ) -> list[str]:
        """The modules of a LoRA that this base does not have, or has in other sizes.

        ``weights``: ``{module}.lora_a`` (in, r) and ``{module}.lora_b`` (r, out). A module that is
        alike in several layers takes one line. Where PEFT's ``config`` picks no layers, a module
        that has LoRA in one layer has it in all.
        """
        if self.config.get("model_file") is not None:
            return []  # only the base's own Python files know, and nothing here runs them
        modules = dict(self._skeleton().named_modules())
        found: dict[str, list[str]] = defaultdict(list)
        tuned = {name.rpartition(".")[0] for name in weights}
        kinds = {place(name)[::2] for name in tuned}
        for name in () if NameRules(config).picks_layers else sorted(modules.keys() - tuned):
            stack, layer, inside = place(name)
            if layer is not None and (stack, inside) in kinds:
                what = f"{inside} has no LoRA in some layers, though target_modules names it"
                found[what].append(name)
        for name in sorted(tuned):
            lora = (weights[f"{name}.lora_b"].shape[1], weights[f"{name}.lora_a"].shape[0])
            inside, own = place(name)[2], modules.get(name, {}).get("weight")
            if own is None:
                found[f"{self} has no module {inside}"].append(name)
            elif own.shape != lora:
                found[f"{self} has {inside} {own.shape}, its LoRA is for {lora}"].append(name)
        return [f"{what} ({_where(names)})" for what, names in found.items()]

    def take_copies(self, tensors: dict[str, mx.array], problems: list[str]) -> list[str]:
        """Takes what repeats this base out of PEFT's tensors, and returns the names.

        What has such a name and is no copy joins the problems.
        """
        copies = copies_of_base(tensors, self.is_plain)
        if copies:  # without any, the base's weights are not needed
            problems += self.copy_problems(copies, {name: tensors.pop(name) for name in copies})
        return [*copies]

    def copy_problems(
        self, copies: Mapping[str, str], tensors: Mapping[str, mx.array]
    ) -> list[str]:
        """Which tensors are not those of this base, to the bit once they have the same dtype.

        ``copies`` gives each tensor's name in the base, whose weights are downloaded if they are
        not here.
        """
        own, problems = self._weights(), []
        for name, path in copies.items():
            found, shape = f"tensor {name} {tensors[name].shape}", tensors[name].shape
            if f"{path.rpartition('.')[0]}.scales" in own:
                problems.append(
                    f"{found} may be a copy, but {self} is quantized there: give the model that it "
                    "was made from"
                )
            elif path not in own:
                problems.append(f"{found} is not part of a LoRA, and {self} has none of its name")
            elif own[path].shape != shape:
                problems.append(
                    f"{found} is not a copy of the base's: {self} has {own[path].shape}; retrain "
                    "without resizing the vocabulary"
                )
            elif not mx.array_equal(own[path].astype(tensors[name].dtype), tensors[name]):
                problems.append(
                    f"{found} is not a copy of the base's: it was trained, or is of another base "
                    f"than {self}; retrain with LoRA alone, or give that base"
                )
        return problems

    def _skeleton(self) -> nn.Module:
        """The model without its weights: its arrays are never evaluated."""
        try:
            return base.skeleton(self.config)
        except base.LOAD_ERRORS as error:
            raise ModelError(f"cannot build {self}: {first_line(error)}") from error

    def _weights(self) -> dict[str, mx.array]:
        """The base's tensors by name, not read yet; a tied head is its table."""
        path = base.resolve(self.merge.base.id)
        try:
            model, _ = load_model(path, lazy=True, model_config=self.config)
        except base.LOAD_ERRORS as error:
            raise ModelError(f"cannot load {self}: {first_line(error)}") from error
        table, _ = base.find_embedding(model, str(self))
        found = dict(tree_flatten(model.parameters()))
        inside = f"{table}."
        tied = {n.replace(inside, f"{HEAD}."): a for n, a in found.items() if n.startswith(inside)}
        return tied | found


def _where(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
