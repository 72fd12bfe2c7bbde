"""Which modules the name options of a PEFT config mean.

Source: ``peft.tuners.tuners_utils.check_target_module_exists`` and
``peft.utils.other.get_pattern_key`` of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kmerge_mlx.adapters.folder import HEAD, name_ends

PATTERNS = ("rank_pattern", "alpha_pattern")
MAX_REPEATS = 10_000  # the product of all {n}: repeats of repeats can take all memory


class PatternError(Exception):
    """A name option that holds an invalid regular expression; says which, in one line."""


class NameRules:
    """What the name options of a PEFT config say of each adapted module.

    Args:
        config: The content of PEFT's ``adapter_config.json``, of the right types.
        names: Full paths of the modules.

    Raises:
        PatternError: An expression is not one.
    """

    def __init__(self, config: Mapping[str, Any], names: Sequence[str]) -> None:
        self._config = config
        self._targets, self._excluded = config["target_modules"], config.get("exclude_modules")
        self._all_linear = isinstance(self._targets, str) and self._targets.lower() == "all-linear"
        self._used = {end for name in names for end in name_ends(name)}
        layers = config.get("layers_to_transform")
        self._layers = [layers] if isinstance(layers, int) else layers or []
        self._patterns = {
            option: [
                (_compiled(option, rf"(.*\.)?({key})$"), value)
                for key, value in (config.get(option) or {}).items()
            ]
            for option in PATTERNS
        }
        for option in ("target_modules", "exclude_modules"):
            if isinstance(config.get(option), str):
                _compiled(option, config[option])
        where = config.get("layers_pattern") or []
        named = [where] if isinstance(where, str) else where
        numbered = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in named]
        self._numbers = [
            _compiled("layers_pattern", expression)
            for expression in numbered or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        ]

    def value(self, option: str, name: str, default: Any) -> Any:
        """What ``rank_pattern`` or ``alpha_pattern`` gives a module: the first key that fits."""
        for key, value in self._patterns[option]:
            if key.match(name):
                return value
        return (self._config.get(option) or {}).get(name, default)

    def objection(self, name: str) -> str | None:
        """Why PEFT would not apply LoRA to a module, or None."""
        if self._excluded and _names(self._excluded, name):
            return "exclude_modules names it"
        if self._all_linear:
            return "all-linear leaves the head out" if name == HEAD else None
        if not _names(self._targets, name):
            return "target_modules does not name it"
        if not self._layers or name in self._targets:
            return None
        found = next((m["idx"] for n in self._numbers if (m := n.match(name))), None) or ""
        chosen = 0 < len(found) < 10 and int(found) in self._layers
        return None if chosen else "layers_to_transform leaves it out"

    def unused_targets(self) -> list[str]:
        """Entries of ``target_modules`` that no module ends with, and nothing may exclude."""
        if isinstance(self._targets, str) or self._excluded:
            return []
        return sorted(set(self._targets) - self._used)

    @property
    def picks_layers(self) -> bool:
        """Whether the options may leave layers of the base out."""
        if self._excluded or self._layers:
            return True
        if isinstance(self._targets, str):
            return not self._all_linear
        return any(part.isdigit() for target in self._targets for part in target.split("."))


def _names(option: str | list[str], name: str) -> bool:
    """Whether an expression, or an entry of a list, means a module."""
    if isinstance(option, str):
        return re.fullmatch(option, name) is not None
    return not name_ends(name).isdisjoint(option)


def _compiled(option: str, expression: str) -> re.Pattern[str]:
    counts = map(int, re.findall(r"\d{1,9}(?=\}|,\d*\})", expression))
    try:
        if math.prod(max(1, count) for count in counts) > MAX_REPEATS:
            raise re.error("its repeats are too large")
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{option}: {expression!a:.80} is not valid ({error})") from None
