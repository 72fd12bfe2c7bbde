"""What merge_config.json says of a window encoder: its sizes, and the tokens around what it read.

Source: arXiv 2606.09659 (LCLM); docs/lclm.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

from kmerge_mlx.config import is_int
from kmerge_mlx.errors import AdapterError, findings, short

ENTRY = "window_encoder"
MEAN, CONCAT = "mean", "concat"
POOLINGS = (MEAN, CONCAT)
_LEAST = {"merge_factor": 2, "overlap": 0, "start_token_id": 0, "end_token_id": 0}


@dataclass(frozen=True)
class WindowConfig:
    """Sizes of a window encoder.

    Args:
        merge_factor: N, how many tokens one position stands for.
        hidden_size: D, the width of the model that reads the positions.
        encoder_size: E, the width of the model that reads the tokens.
        inner_size: H, the width between the two layers of the projection.
        window: W, how many tokens are read at once; a multiple of N.
        overlap: O, how many tokens before a window are read with it and not pooled.
        pooling: How N hidden states become one: their ``mean``, or ``concat``, end to end.
        start_token_id: The token before a merged text.
        end_token_id: The token after it.

    Raises:
        AdapterError: Every size that such an encoder cannot have, listed.
    """

    merge_factor: int
    hidden_size: int
    encoder_size: int
    inner_size: int
    window: int
    overlap: int
    pooling: str
    start_token_id: int
    end_token_id: int

    def __post_init__(self) -> None:
        sizes = {n: v for n, v in asdict(self).items() if n != "pooling"}
        problems = [
            f"{name} is {short(value)}, expected a whole number of at least {_LEAST.get(name, 1)}"
            for name, value in sizes.items()
            if not is_int(value, _LEAST.get(name, 1))
        ]
        if self.pooling not in POOLINGS:
            problems.append(f"pooling is {short(self.pooling)}, expected {' or '.join(POOLINGS)}")
        if not problems and self.window % self.merge_factor:
            problems.append(
                f"window is {self.window}, expected a multiple of merge_factor {self.merge_factor}"
            )
        if problems:
            raise AdapterError(findings("window encoder", problems))

    @property
    def pooled_size(self) -> int:
        """The width of a pooled group: E, or N * E where states lie end to end."""
        return self.encoder_size * (self.merge_factor if self.pooling == CONCAT else 1)

    def check_reader(self, limit: int | None) -> None:
        """Refuses windows that the model which reads them was not made for.

        Args:
            limit: The most tokens that it reads, or None if it does not say.

        Raises:
            AdapterError: They are longer.
        """
        if limit is not None and self.window + self.overlap > limit:
            raise AdapterError(
                f"the encoder reads windows of {self.window:,} tokens and {self.overlap:,} before "
                f"them, and its config.json allows {limit:,}"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes of the projection; weights are ``(out, in)``."""
        width, h, d = self.pooled_size, self.inner_size, self.hidden_size
        shapes = {"norm.weight": (width,), "fc1.weight": (h, width), "fc1.bias": (h,)}
        return shapes | {"fc2.weight": (d, h), "fc2.bias": (d,)}

    @property
    def num_parameters(self) -> int:
        """How many numbers the projection holds."""
        return sum(prod(shape) for shape in self.shapes().values())

    @property
    def packed(self) -> frozenset[str]:
        """Names of parameters that hold packed integers: none, the projection is never packed."""
        return frozenset()

    def to_json(self) -> dict[str, Any]:
        """The encoder's entries of ``merge_config.json``."""
        return {"merge_factor": self.merge_factor, ENTRY: asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WindowConfig:
        """Reads the encoder's entries of ``merge_config.json``."""
        entry = data[ENTRY]
        names = {field.name for field in fields(cls)}
        if not isinstance(entry, dict) or entry.keys() != names:
            listed = ", ".join(sorted(names))
            raise AdapterError(f"merge_config.json: {ENTRY} is {short(entry)}, expected {listed}")
        if entry["merge_factor"] != data.get("merge_factor"):
            found = f"{short(data.get('merge_factor'))} and {short(entry['merge_factor'])}"
            raise AdapterError(f"merge_config.json: merge_factor is {found} in {ENTRY}")
        return cls(**entry)
