"""``kmerge.json``: what an encoder.pth and PEFT's files cannot say of an adapter.

Owns the file: the adapter's ``merge_config.json`` (padding token, layout, base, provenance), and
the LoRA scales that no ``lora_alpha`` gives to the last bit. ``export`` writes it, and ``convert``
reads it where it is there. What both it and the other files say must agree, but for the LoRA: that
may have been trained on, in PyTorch, with another rank or other modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge_mlx.adapters.schema import EncoderConfig, MergeConfig
from kmerge_mlx.config import is_number
from kmerge_mlx.errors import AdapterError, CheckpointError, short
from kmerge_mlx.files import read_json

COMPANION = "kmerge.json"
MERGE, SCALES = "merge_config.json", "scales"


@dataclass(frozen=True)
class Companion:
    """The content of ``kmerge.json``.

    Args:
        merge: What the adapter's ``merge_config.json`` said.
        scales: LoRA scales that PEFT's files give only to within the last bit of a float64.
    """

    merge: MergeConfig
    scales: Sequence[float] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {MERGE: self.merge.to_json(), SCALES: [*self.scales]}

    @classmethod
    def from_json(cls, data: Any) -> Companion:
        """Reads the content of the file.

        Raises:
            AdapterError: Not an object with exactly these entries, or one of them is wrong.
        """
        if not isinstance(data, dict) or data.keys() != {MERGE, SCALES}:
            raise AdapterError(f"found {short(data)}, expected {MERGE} and {SCALES}")
        scales = data[SCALES]
        if not isinstance(scales, list) or not all(is_number(scale) for scale in scales):
            raise AdapterError(f"{SCALES} is {short(scales)}, expected a list of numbers")
        merge = MergeConfig.from_json(data[MERGE])
        if not (merge.base.id or "").isprintable():
            raise AdapterError(
                f"base_model.id is {short(merge.base.id)}, expected a printable name"
            )
        return cls(merge, scales)

    def disagreement(self, encoder: EncoderConfig) -> str | None:
        """How its encoder differs from the one that is there, if it does."""
        stated = self.merge.encoder
        if stated == encoder:
            return None
        if stated is None:
            return f"found an encoder for K = {encoder.merge_factor}, the adapter was made for none"
        found, said = encoder.to_json(), stated.to_json()
        names = [name for name in said if found[name] != said[name]]
        differs = ", ".join(f"{name} {found[name]}, not {said[name]}" for name in names)
        return f"the encoder has {differs}"


def read_companion(folder: Path) -> Companion | None:
    """The companion in a checkpoint folder, or None where there is none.

    Raises:
        CheckpointError: It is torn, or not what :class:`Companion` writes.
    """
    path = folder / COMPANION
    if not path.exists():
        return None
    try:
        return Companion.from_json(read_json(path, CheckpointError))
    except AdapterError as error:
        raise CheckpointError(f"{path}: {error}; remove the file to convert without it") from None
