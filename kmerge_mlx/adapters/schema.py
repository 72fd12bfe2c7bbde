"""The content of ``merge_config.json``: encoder sizes, base model, padding token, layout.

Source: arXiv 2604.15153 section 3 (encoder sizes); docs/adapter-format.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.errors import AdapterError, findings, short
from kmerge_mlx.prompts.lay_out import Layout

FORMAT_VERSION = 1
"""Version of the adapter folder that this release writes, and the newest it reads."""

ENCODER_FACTORS = {2: 2.0, 3: 2.0, 4: 1.5}
"""The paper's factor for each K, in H = int(factor * K) * D; past K = 4 that of K = 4."""

ENCODER_ENTRIES = ("merge_factor", "hidden_size", "inner_size", "encoder_context")
QUANTIZATION = "encoder_quantization"
"""Entry of a quantized encoder's bits and group size; absent where it is not quantized."""

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (64, 32, 128)
"""MLX's group sizes, the preferred one first."""

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
"""MLX's quantization modes for a base model. An encoder is always packed by the first."""


def inner_size(merge_factor: int, hidden_size: int, factor: float | None = None) -> int:
    """The inner width H of the encoder for a merge factor.

    Args:
        merge_factor: K, at least 2.
        hidden_size: D, the base model's embedding width.
        factor: Of the width; None is the paper's.

    Returns:
        H = int(factor * K) * D; the paper's is 4D, 6D, 6D for K = 2, 3, 4.
    """
    if factor is None:
        factor = ENCODER_FACTORS.get(merge_factor, ENCODER_FACTORS[4])
    return int(factor * merge_factor) * hidden_size


@dataclass(frozen=True)
class EncoderQuantization:
    """How the weights of a merge encoder are packed, as ``mlx.nn.QuantizedLinear`` packs them.

    Args:
        bits: Bits of a weight.
        group_size: How many weights share a scale and a bias.

    Raises:
        AdapterError: Values that MLX does not have.
    """

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        for name, known in (("bits", BITS), ("group_size", GROUP_SIZES)):
            value = getattr(self, name)
            if not is_int(value) or value not in known:
                raise AdapterError(
                    f"{QUANTIZATION}: {name} is {short(value)}, expected one of {known}"
                )

    @classmethod
    def of_width(cls, bits: int, widths: Iterable[int]) -> EncoderQuantization:
        """The packing for weights whose rows have these widths.

        Raises:
            AdapterError: No group size divides all of them, or MLX does not have such bits.
        """
        widths = sorted(set(widths))
        for group_size in GROUP_SIZES:
            if all(width % group_size == 0 for width in widths):
                return cls(bits, group_size)
        raise AdapterError(
            f"the merge encoder cannot be quantized: it reads {', '.join(map(str, widths))} "
            f"numbers, and none of MLX's groups of {GROUP_SIZES} divides all of them"
        )


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a merge encoder.

    Args:
        merge_factor: K, how many token embeddings one block merges.
        hidden_size: D, the base model's embedding width.
        inner_size: H, the width of the first hidden layer.
        context: c, how many tokens before its block the encoder also reads; 0 is the paper's.
        quantization: How its weights are packed, or None: they are floating-point numbers.

    Raises:
        AdapterError: A size that an encoder cannot have, or that cannot be packed this way.
    """

    merge_factor: int
    hidden_size: int
    inner_size: int
    context: int = 0
    quantization: EncoderQuantization | None = None

    def __post_init__(self) -> None:
        lowest = dict(zip(ENCODER_ENTRIES, (2, 1, 1, 0), strict=True))
        problems = [
            f"{name} is {short(value)}, expected a whole number of at least {lowest[name]}"
            for name, value in self._sizes().items()
            if not is_int(value, lowest[name])
        ]
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
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (out, inner) in self.layers().items():
            shapes[f"{layer}.weight"] = (out, inner)
            if (packing := self.quantization) is not None:
                shapes[f"{layer}.weight"] = (out, inner * packing.bits // 32)
                shapes[f"{layer}.scales"] = (out, inner // packing.group_size)
                shapes[f"{layer}.biases"] = (out, inner // packing.group_size)
            shapes[f"{layer}.bias"] = (out,)
        return shapes

    @property
    def packed(self) -> frozenset[str]:
        """Names of the parameters that hold packed integers: every weight when quantized."""
        names = () if self.quantization is None else self.layers()
        return frozenset(f"{layer}.weight" for layer in names)

    @property
    def num_parameters(self) -> int:
        """How many numbers the encoder holds, packed or not."""
        return sum(out * inner + out for out, inner in self.layers().values())

    def to_json(self) -> dict[str, Any]:
        """The encoder's entries of ``merge_config.json``."""
        if self.quantization is None:
            return self._sizes()
        return self._sizes() | {QUANTIZATION: asdict(self.quantization)}

    def _sizes(self) -> dict[str, int]:
        sizes = (self.merge_factor, self.hidden_size, self.inner_size, self.context)
        return dict(zip(ENCODER_ENTRIES, sizes, strict=True))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncoderConfig | None:
        """Reads the encoder's entries of ``merge_config.json``; None for K = 1, without encoder.

        Raises:
            AdapterError: A size that an encoder cannot have, or one where K is 1.
        """
        names = (*ENCODER_ENTRIES, QUANTIZATION)
        factor, hidden, inner, context, packing = (data.get(name) for name in names)
        if is_int(factor) and factor == 1:
            others = [f"{n} is {short(data[n])}" for n in names[1:] if data.get(n) is not None]
            if others:
                raise AdapterError(
                    f"merge_config.json: {', '.join(others)}, expected null: merge_factor 1 has no "
                    "encoder"
                )
            return None
        if packing is not None:
            if not isinstance(packing, dict) or set(packing) != {"bits", "group_size"}:
                raise AdapterError(
                    f"merge_config.json: {QUANTIZATION} is {short(packing)}, expected null or an "
                    "object with bits and group_size"
                )
            packing = EncoderQuantization(**packing)
        # The first adapters do not name the context: theirs is 0.
        return cls(factor, hidden, inner, 0 if context is None else context, packing)


@dataclass(frozen=True)
class LoRASpec:
    """One module's LoRA: ``y = W x + scale * B A x``.

    Args:
        rank: Inner width r of A and B.
        scale: mlx-lm's scale, which is PEFT's alpha / r (alpha / sqrt(r) under rsLoRA).

    Raises:
        AdapterError: A rank below 1, or a scale that is not a finite number.
    """

    rank: int
    scale: float

    def __post_init__(self) -> None:
        if not is_int(self.rank, 1) or not is_number(self.scale):
            raise AdapterError(
                f"LoRA with rank {short(self.rank)} and scale {short(self.scale)}: "
                "expected a whole rank of at least 1 and a finite scale"
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
        id: Folder or hub repo id, as the user gave it; for people.
        fields: The config entries that must agree (see ``base.fingerprint``), or empty where the
            adapter was converted without ``--model``.
    """

    id: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config_hash(self) -> str | None:
        """SHA-256 of ``fields`` as canonical JSON, or None without fields."""
        if not self.fields:
            return None
        text = json.dumps(dict(self.fields), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

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
        encoder: Sizes of the merge encoder, or None for merge factor 1: nothing is merged.
        base: The base model.
        pad_token_id: Token that fills the last block, or None: taken from the tokenizer.
        head_lora: Rank and scale of the output head's LoRA kept beside the encoder, or None.
        layout: How prompts were laid out in training, or None: that is not known.
        provenance: Where the numbers come from; free-form, for people.
    """

    encoder: EncoderConfig | None
    base: BaseModelConfig = BaseModelConfig()
    pad_token_id: int | None = None
    head_lora: LoRASpec | None = None
    layout: Layout | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def merge_factor(self) -> int:
        """K, how many tokens one merged position stands for."""
        return 1 if self.encoder is None else self.encoder.merge_factor

    def encoder_entries(self) -> dict[str, Any]:
        """The encoder's entries of ``merge_config.json``; without an encoder all but K are null."""
        if self.encoder is None:
            return dict.fromkeys(ENCODER_ENTRIES) | {"merge_factor": 1}
        return self.encoder.to_json()

    def to_json(self) -> dict[str, Any]:
        """The content of ``merge_config.json``."""
        return {
            "format_version": FORMAT_VERSION,
            **self.encoder_entries(),
            "pad_token_id": self.pad_token_id,
            "base_model": {
                "id": self.base.id,
                "config_hash": self.base.config_hash,
                "config": dict(self.base.fields),
            },
            "head_lora": None if self.head_lora is None else asdict(self.head_lora),
            "layout": None if self.layout is None else asdict(self.layout),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any) -> MergeConfig:
        """Reads ``merge_config.json``.

        Raises:
            AdapterError: Not an object, a newer format, or entries of the wrong type (all listed).
        """
        if not isinstance(data, dict):
            raise AdapterError(f"merge_config.json holds {short(data)}, expected an object")
        version = data.get("format_version")
        if not is_int(version, 1):
            raise AdapterError(f"merge_config.json: format_version is {short(version)}, expected 1")
        if version > FORMAT_VERSION:
            raise AdapterError(
                f"merge_config.json: format_version {short(version)} is newer than this release "
                f"reads ({FORMAT_VERSION}): update kmerge-mlx"
            )
        if problems := _problems(data):
            raise AdapterError(findings("merge_config.json", problems))
        entry, head = data.get("base_model") or {}, data.get("head_lora")
        base = BaseModelConfig(entry.get("id"), entry.get("config") or {})
        if entry.get("config_hash") != base.config_hash:
            raise AdapterError(
                "merge_config.json: base_model.config_hash does not belong to base_model.config: "
                "one of them was edited; convert the checkpoint again"
            )
        return cls(
            EncoderConfig.from_json(data),
            base,
            data.get("pad_token_id"),
            None if head is None else LoRASpec.from_json(head, "merge_config.json: head_lora"),
            Layout.from_json(data.get("layout") or {}),
            data.get("provenance") or {},
        )


def _problems(data: Mapping[str, Any]) -> list[str]:
    """Entries of the wrong type in ``merge_config.json``, one line each."""
    problems = [
        f"{name} is {short(data[name])}, expected an object"
        for name in ("base_model", "layout", "provenance")
        if not isinstance(data.get(name), dict | None)
    ]
    pad, base = data.get("pad_token_id"), data.get("base_model")
    if pad is not None and not is_int(pad):
        problems.append(f"pad_token_id is {short(pad)}, expected a token id or null")
    if isinstance(base, dict):
        if not isinstance(base.get("id"), str | None):
            problems.append(f"base_model.id is {short(base['id'])}, expected a name or null")
        if not isinstance(base.get("config"), dict | None):
            problems.append(f"base_model.config is {short(base['config'])}, expected an object")
    return problems
