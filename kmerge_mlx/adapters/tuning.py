"""The content of ``adapter_config.json``: which modules carry LoRA, or which layers are whole.

Source: mlx-lm's ``fine_tune_type``, ``num_layers`` and ``lora_parameters``
(``mlx_lm.tuner.utils.load_adapters``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kmerge_mlx.adapters.schema import LoRASpec
from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.errors import AdapterError, short

LORA, FULL = "lora", "full"
_FILE = "adapter_config.json"


@dataclass(frozen=True)
class LoRAConfig:
    """Which modules carry LoRA, in one of two forms.

    *Uniform*: one rank and scale for the same ``keys`` of the last ``num_layers`` layers. This is
    mlx-lm's own schema, so mlx-lm loads it too. *By module*: full module paths, each with its own
    rank and scale (rank_pattern, alpha_pattern, layers_to_transform, a regex). mlx-lm has no such
    schema; the file then holds no global ``scale``, and mlx-lm refuses it instead of misreading it.

    Args:
        num_layers: How many layers the adapter covers, counted from the last.
        dropout: LoRA dropout of the training run.
        uniform: Rank and scale of every module in ``keys``, or None.
        keys: Module paths inside one layer (``self_attn.q_proj``), or full ones (``lm_head``).
        modules: Full module path to rank and scale; empty in the uniform form.
    """

    num_layers: int
    dropout: float = 0.0
    uniform: LoRASpec | None = None
    keys: tuple[str, ...] = ()
    modules: Mapping[str, LoRASpec] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``."""
        if self.uniform is not None:
            parameters = {**asdict(self.uniform), "dropout": self.dropout, "keys": [*self.keys]}
        else:
            modules = {name: asdict(spec) for name, spec in self.modules.items()}
            parameters = {"dropout": self.dropout, "modules": modules}
        return {
            "fine_tune_type": LORA,
            "num_layers": self.num_layers,
            "lora_parameters": parameters,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoRAConfig:
        """Reads the object in ``adapter_config.json``.

        Raises:
            AdapterError: A key that is missing or of the wrong type.
        """
        layers, parameters = data.get("num_layers"), data.get("lora_parameters")
        if not isinstance(parameters, dict) or not is_int(layers):
            raise AdapterError(f"{_FILE}: expected num_layers and lora_parameters")
        dropout = parameters.get("dropout", 0.0)
        if not is_number(dropout) or not 0 <= dropout < 1:
            raise AdapterError(f"{_FILE}: dropout {short(dropout)} is not in [0, 1)")
        if "modules" in parameters:
            modules, where = parameters["modules"], f"{_FILE}: lora_parameters.modules"
            if not isinstance(modules, dict):
                raise AdapterError(f"{where} is not an object")
            specs = {n: LoRASpec.from_json(s, f"{where}.{n}") for n, s in modules.items()}
            return cls(layers, dropout, modules=specs)
        keys = parameters.get("keys")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise AdapterError(f"{_FILE}: lora_parameters.keys is not a list of names")
        uniform = LoRASpec(parameters.get("rank"), parameters.get("scale"))
        return cls(layers, dropout, uniform, tuple(keys))


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: the last layers' own weights take the place of the base's.

    Args:
        num_layers: How many layers, counted from the last; -1 or 0 means all, as in mlx-lm.
    """

    num_layers: int

    def to_json(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``."""
        return {"fine_tune_type": FULL, "num_layers": self.num_layers}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FullConfig:
        """Reads the object in ``adapter_config.json``.

        Raises:
            AdapterError: ``num_layers`` is missing or of the wrong type.
        """
        layers = data.get("num_layers")
        if not is_int(layers, -1):
            raise AdapterError(
                f"{_FILE}: num_layers is {short(layers)}, expected a whole number, or -1 for all "
                "layers"
            )
        return cls(layers)


Tuning = LoRAConfig | FullConfig


def read_tuning(data: Any) -> Tuning:
    """Reads ``adapter_config.json``.

    Raises:
        AdapterError: Not an object, a fine-tune type other than ``lora`` and ``full``, or a key
            that is missing or of the wrong type.
    """
    if not isinstance(data, dict):
        raise AdapterError(f"{_FILE} holds {short(data)}, expected an object")
    kind = data.get("fine_tune_type", LORA)
    if kind not in (LORA, FULL):
        raise AdapterError(
            f"{_FILE}: fine_tune_type {short(kind)} is not supported, expected {LORA} or {FULL}"
        )
    return (LoRAConfig if kind == LORA else FullConfig).from_json(data)
