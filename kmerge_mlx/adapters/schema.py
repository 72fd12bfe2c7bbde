"""What merge_config.json and adapter_config.json say: encoder, base model, layout, LoRA or layers.

Source: arXiv 2604.15153 section 3 (encoder sizes); docs/adapter-format.md. What changes is mlx-lm's
``fine_tune_type``, ``num_layers`` and ``lora_parameters`` (``mlx_lm.tuner.utils.load_adapters``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kmerge_mlx.adapters import window
from kmerge_mlx.adapters.packing import BITS, GROUP_SIZES, EncoderQuantization
from kmerge_mlx.adapters.window import WindowConfig
from kmerge_mlx.config import MAX_RANK, is_int, is_number
from kmerge_mlx.errors import AdapterError, findings, short
from kmerge_mlx.prompts.policy import Layout

FORMAT_VERSION, WINDOW_VERSION = 1, 2
"""Versions of the adapter folder: with a window encoder it is 2, which is the newest."""

ENCODER_FACTORS = {2: 2.0, 3: 2.0, 4: 1.5}
"""The paper's factor for each K, in H = int(factor * K) * D; it has none past K = 4."""

ENCODER_ENTRIES = ("merge_factor", "hidden_size", "inner_size", "encoder_context")
QUANTIZATION = "encoder_quantization"  # absent where the encoder is not quantized
START = "encoder_start"  # absent where it is the mean
MEAN, INFORMATION = "mean", "information"
STARTS = (MEAN, INFORMATION)
"""What an encoder gives before training: a block's mean, or its tokens weighed by their rarity."""

LORA, FULL = "lora", "full"
_TUNING, _MERGE = "adapter_config.json", "merge_config.json"


def inner_size(merge_factor: int, hidden_size: int, factor: float | None = None) -> int:
    """H, the encoder's inner width: int(factor * K) * D, or of a factor below 1 / K its share of D.

    Without a factor the paper's up to K = 4, and H = D / 2 above: as good there
    (docs/encoders.md), and the encoder's work per prompt token does not grow with K.
    """
    if factor is None and merge_factor not in ENCODER_FACTORS:
        return max(hidden_size // 2, 1)
    multiple = merge_factor * (ENCODER_FACTORS[merge_factor] if factor is None else factor)
    return int(multiple * hidden_size) if multiple < 1 else int(multiple) * hidden_size


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a merge encoder.

    Args:
        merge_factor: K, how many token embeddings one block merges.
        hidden_size: D, the base model's embedding width.
        inner_size: H, the width of the first hidden layer.
        context: c, how many tokens before its block the encoder also reads; 0 is the paper's.
        start: What it gives before any training, one of ``STARTS``.
        quantization: How its weights are packed, or None: they are floating-point numbers.

    Raises:
        AdapterError: A size that an encoder cannot have, or that cannot be packed this way.
    """

    merge_factor: int
    hidden_size: int
    inner_size: int
    context: int = 0
    quantization: EncoderQuantization | None = None
    start: str = MEAN

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {short(value)}, expected a whole number of at least {low}"
            for (name, value), low in zip(self._sizes().items(), (2, 1, 1, 0), strict=True)
            if not is_int(value, low)
        ]
        if self.start not in STARTS:
            problems.append(f"{START} is {short(self.start)}, expected one of {', '.join(STARTS)}")
        if not problems and (packing := self.quantization) is not None:
            problems = [
                f"{layer} reads {inner} numbers, expected whole groups of {packing.group_size}"
                for layer, (_, inner) in self.layers().items()
                if inner % packing.group_size
            ]
        if problems:
            raise AdapterError(findings("merge encoder", problems))

    def layers(self) -> dict[str, tuple[int, int]]:
        """The ``(out, in)`` widths of each layer."""
        wide, d, h = self.merge_factor * self.hidden_size, self.hidden_size, self.inner_size
        return {"w1": (h, self.context * d + wide), "w2": (wide, h), "w3": (d, wide)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes, as stored: weights are ``(out, in)``, or packed."""
        d = self.hidden_size
        start = {"center": (d,), "gate_weight": (d,), "gate_bias": (1,)}
        shapes: dict[str, tuple[int, ...]] = start if self.start == INFORMATION else {}
        for layer, (out, inner) in self.layers().items():
            shapes |= {f"{layer}.weight": (out, inner), f"{layer}.bias": (out,)}
            if (packing := self.quantization) is not None:
                shapes[f"{layer}.weight"] = (out, inner * packing.bits // 32)
                groups = (out, inner // packing.group_size)
                shapes |= {f"{layer}.scales": groups, f"{layer}.biases": groups}
        return shapes

    @property
    def packed(self) -> frozenset[str]:
        """Names of the parameters that hold packed integers: every weight when quantized."""
        return frozenset(f"{layer}.weight" for layer in self.layers() if self.quantization)

    @property
    def num_parameters(self) -> int:
        """How many numbers the encoder holds, packed or not."""
        own = 2 * self.hidden_size + 1 if self.start == INFORMATION else 0
        return own + sum(out * inner + out for out, inner in self.layers().values())

    def to_json(self) -> dict[str, Any]:
        """The encoder's entries of ``merge_config.json``."""
        packing = {} if self.quantization is None else {QUANTIZATION: asdict(self.quantization)}
        start = {} if self.start == MEAN else {START: self.start}
        return self._sizes() | packing | start

    def _sizes(self) -> dict[str, int]:
        sizes = (self.merge_factor, self.hidden_size, self.inner_size, self.context)
        return dict(zip(ENCODER_ENTRIES, sizes, strict=True))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncoderConfig | None:
        """Reads the encoder's entries of ``merge_config.json``; None for K = 1, without encoder."""
        names = (*ENCODER_ENTRIES, QUANTIZATION, START)
        factor, hidden, inner, context, packing, start = (data.get(name) for name in names)
        if is_int(factor) and factor == 1:
            for name in names[1:]:
                if data.get(name) is not None:
                    found = f"{_MERGE}: {name} is {short(data[name])}"
                    raise AdapterError(f"{found}, expected null: merge_factor 1 has no encoder")
            return None
        if packing is not None:
            entries = packing if isinstance(packing, dict) else {}
            bits, group = entries.get("bits"), entries.get("group_size")
            whole = len(entries) == 2 and is_int(bits) and is_int(group)
            if not whole or bits not in BITS or group not in GROUP_SIZES:
                raise AdapterError(
                    f"{_MERGE}: {QUANTIZATION} is {short(packing)}, expected null or bits of "
                    f"{BITS} and a group_size of {GROUP_SIZES}"
                )
            packing = EncoderQuantization(bits, group)
        # The first adapters do not name the context: theirs is 0.
        context, start = 0 if context is None else context, MEAN if start is None else start
        return cls(factor, hidden, inner, context, packing, start)


@dataclass(frozen=True)
class LoRASpec:
    """One module's LoRA: ``y = W x + scale * B A x``.

    Args:
        rank: Inner width r of A and B.
        scale: mlx-lm's scale, which is PEFT's alpha / r (alpha / sqrt(r) under rsLoRA).

    Raises:
        AdapterError: A rank out of range, or a scale that is not a finite number.
    """

    rank: int
    scale: float

    def __post_init__(self) -> None:
        if not is_int(self.rank, 1) or self.rank > MAX_RANK or not is_number(self.scale):
            raise AdapterError(
                f"LoRA with rank {short(self.rank)} and scale {short(self.scale)}: "
                f"expected a whole rank of 1 to {MAX_RANK:,} and a finite scale"
            )

    @classmethod
    def from_json(cls, data: Any, where: str) -> LoRASpec:
        """Reads ``{"rank": r, "scale": s}``; ``where`` names the entry in an error."""
        if not isinstance(data, dict) or set(data) != {"rank", "scale"}:
            raise AdapterError(f"{where} is {short(data)}, expected {{rank, scale}}")
        return cls(data["rank"], data["scale"])


@dataclass(frozen=True)
class BaseModelConfig:
    """The base model an adapter was made for.

    Args:
        id: Folder or hub repo id, as the user gave it; files hold it relative to themselves.
        fields: The config entries that must agree (see ``base.fingerprint``), or empty where the
            adapter was converted without ``--model``.
    """

    id: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config_hash(self) -> str | None:
        """SHA-256 of ``fields`` as canonical JSON, or None without fields."""
        text = json.dumps({**self.fields}, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest() if self.fields else None

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields that both sides name and that disagree, one line each."""
        return [
            f"{name} is {other[name]!r}, the adapter was made for {value!r}"
            for name, value in self.fields.items()
            if name in other and other[name] != value
        ]


@dataclass(frozen=True)
class MergeConfig:
    """The content of ``merge_config.json``.

    Args:
        encoder: Sizes of the merge encoder, or of a window encoder, or None for merge factor 1:
            nothing is merged.
        base: The base model.
        pad_token_id: Token that fills the last block, or None: taken from the tokenizer.
        head_lora: Rank and scale of the output head's LoRA kept beside the encoder, or None.
        layout: How prompts were laid out in training, or None: that is not known.
        provenance: Where the numbers come from; free-form, for people.
    """

    encoder: EncoderConfig | WindowConfig | None
    base: BaseModelConfig = BaseModelConfig()
    pad_token_id: int | None = None
    head_lora: LoRASpec | None = None
    layout: Layout | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def merge_factor(self) -> int:
        """K, how many tokens one merged position stands for."""
        return 1 if self.encoder is None else self.encoder.merge_factor

    @property
    def has_window(self) -> bool:
        """Whether the encoder is a window encoder."""
        return isinstance(self.encoder, WindowConfig)

    def encoder_entries(self) -> dict[str, Any]:
        """The encoder's entries of ``merge_config.json``; without an encoder all but K are null."""
        nothing = dict.fromkeys(ENCODER_ENTRIES) | {"merge_factor": 1}
        return nothing if self.encoder is None else self.encoder.to_json()

    def to_json(self) -> dict[str, Any]:
        """The content of ``merge_config.json``."""
        return {
            "format_version": WINDOW_VERSION if self.has_window else FORMAT_VERSION,
            **self.encoder_entries(),
            "pad_token_id": self.pad_token_id,
            "base_model": {
                "id": self.base.id,
                "config_hash": self.base.config_hash,
                "config": dict(self.base.fields),
            },
            "head_lora": None if self.head_lora is None else asdict(self.head_lora),
            "layout": None if self.layout is None else self.layout.to_json(),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any) -> MergeConfig:
        """Reads ``merge_config.json``; an AdapterError lists the entries of a wrong type."""
        if not isinstance(data, dict):
            raise AdapterError(f"{_MERGE} holds {short(data)}, expected an object")
        version = data.get("format_version")
        if not is_int(version, 1) or version > WINDOW_VERSION:
            raise AdapterError(
                f"{_MERGE}: format_version is {short(version)}, expected up to {WINDOW_VERSION} (a "
                "newer one needs a newer kmerge-mlx)"
            )
        if problems := _problems(data):
            raise AdapterError(findings(_MERGE, problems))
        entry, head = data.get("base_model") or {}, data.get("head_lora")
        base = BaseModelConfig(entry.get("id"), entry.get("config") or {})
        if entry.get("config_hash") != base.config_hash:
            raise AdapterError(
                f"{_MERGE}: base_model.config_hash does not belong to base_model.config: one of "
                "them was edited; convert the checkpoint again"
            )
        return cls(
            (WindowConfig if window.ENTRY in data else EncoderConfig).from_json(data),
            base,
            data.get("pad_token_id"),
            None if head is None else LoRASpec.from_json(head, f"{_MERGE}: head_lora"),
            Layout.from_json(data.get("layout") or {}),
            data.get("provenance") or {},
        )


def _problems(data: Mapping[str, Any]) -> list[str]:
    """Entries of the wrong type in ``merge_config.json``, one line each."""
    base = data["base_model"] if isinstance(data.get("base_model"), dict) else {}
    entries = {name: (data.get(name), dict) for name in ("base_model", "layout", "provenance")}
    entries["base_model.id"] = (base.get("id"), str)
    entries["base_model.config"] = (base.get("config"), dict)
    problems = [
        f"{name} is {short(value)}, expected {'an object' if kind is dict else 'a name'} or null"
        for name, (value, kind) in entries.items()
        if not isinstance(value, kind | None)
    ]
    if (pad := data.get("pad_token_id")) is not None and not is_int(pad):
        problems.append(f"pad_token_id is {short(pad)}, expected a token id or null")
    return problems


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
        parameters: dict[str, Any] = {"dropout": self.dropout}
        if self.uniform is not None:
            parameters = asdict(self.uniform) | parameters | {"keys": [*self.keys]}
        else:
            parameters["modules"] = {name: asdict(spec) for name, spec in self.modules.items()}
        start = {"fine_tune_type": LORA, "num_layers": self.num_layers}
        return start | {"lora_parameters": parameters}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoRAConfig:
        """Reads ``adapter_config.json``; an AdapterError names a key that is missing or wrong."""
        layers, parameters = data.get("num_layers"), data.get("lora_parameters")
        if not isinstance(parameters, dict) or not is_int(layers):
            raise AdapterError(f"{_TUNING}: expected num_layers and lora_parameters")
        dropout = parameters.get("dropout", 0.0)
        if not is_number(dropout) or not 0 <= dropout < 1:
            raise AdapterError(f"{_TUNING}: dropout {short(dropout)} is not in [0, 1)")
        if "modules" in parameters:
            modules, where = parameters["modules"], f"{_TUNING}: lora_parameters.modules"
            if not isinstance(modules, dict):
                raise AdapterError(f"{where} is not an object")
            specs = {n: LoRASpec.from_json(s, f"{where}.{n}") for n, s in modules.items()}
            return cls(layers, dropout, modules=specs)
        keys = parameters.get("keys")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise AdapterError(f"{_TUNING}: lora_parameters.keys is not a list of names")
        uniform = LoRASpec(parameters.get("rank"), parameters.get("scale"))
        return cls(layers, dropout, uniform, tuple(keys))


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: the last layers' own weights take the place of the base's."""

    num_layers: int  # counted from the last; -1 or 0 means all, as in mlx-lm

    def to_json(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``."""
        return {"fine_tune_type": FULL, "num_layers": self.num_layers}


Tuning = LoRAConfig | FullConfig


def read_tuning(data: Any) -> Tuning:
    """Reads ``adapter_config.json``; raises an AdapterError that names what is wrong."""
    if not isinstance(data, dict):
        raise AdapterError(f"{_TUNING} holds {short(data)}, expected an object")
    kind = data.get("fine_tune_type", LORA)
    if kind not in (LORA, FULL):
        raise AdapterError(f"{_TUNING}: fine_tune_type is {short(kind)}, expected lora or full")
    if kind == LORA:
        return LoRAConfig.from_json(data)
    if not is_int(layers := data.get("num_layers"), -1):
        raise AdapterError(f"{_TUNING}: num_layers is {short(layers)}, expected a count or -1")
    return FullConfig(layers)
