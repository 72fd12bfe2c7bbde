"""Which module each name option of a PEFT config means.

Owns PEFT's rules for ranks, alphas, targets, exclusions and layers, and their safety. The options
may be Python regular expressions, a checkpoint comes from a stranger, and an expression of 20
characters can take years to match, or all memory. So ``re`` decides, as it does in PEFT, but in a
child process that the system stops after two seconds of computing or at 512 MiB. (The ``regex``
package has a timeout, but compiling ``(((a{1000}){1000}){1000}){1000}`` takes every byte there is.)

Source: ``peft.tuners.tuners_utils.check_target_module_exists`` and
``peft.utils.other.get_pattern_key`` of PEFT 0.21.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kmerge_mlx.adapters.folder import HEAD, name_ends

CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20
WALL_SECONDS = 60  # the machine may be busy

# Answers one line for each expression, so that the number of lines tells where it was stopped.
_CHILD = f"""
import json, re, resource, sys
for kind, limit in (("CPU", {CPU_SECONDS}), ("AS", {MEMORY_BYTES}), ("CORE", 0)):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
    except (ValueError, OSError):
        pass  # macOS has no limit on memory
expressions, names = json.load(sys.stdin)
for how, expression in expressions:
    try:
        match = getattr(re.compile(expression), how)
        found = [(i, m) for i, name in enumerate(names) if (m := match(name))]
        answer = [[i, m.groupdict().get("idx") or ""] for i, m in found]
    except Exception as error:
        answer = f"{{type(error).__name__}}: {{error}}"
    print(json.dumps(answer), flush=True)
"""


class PatternError(Exception):
    """A name option that holds an invalid or too expensive expression; says which, in one line."""


class NameRules:
    """What the name options of a PEFT config say of each adapted module.

    Args:
        config: The content of PEFT's ``adapter_config.json``, of the right types.
        names: Full paths of the modules.

    Raises:
        PatternError: An expression cannot be matched.
    """

    def __init__(self, config: Mapping[str, Any], names: Sequence[str]) -> None:
        self._config = config
        targets, excluded = config["target_modules"], config.get("exclude_modules") or []
        self._all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        self._targets = frozenset(targets if isinstance(targets, list) else ())
        shut = frozenset(excluded if isinstance(excluded, list) else ())
        # Module -> the entries of target_modules that it ends with.
        self._named = {name: name_ends(name) & self._targets for name in names}
        self._shut = {name for name in names if name_ends(name) & shut}
        asked: list[tuple[str, str, str]] = []
        for option in ("rank_pattern", "alpha_pattern"):
            asked += [(option, "match", rf"(.*\.)?({key})$") for key in config.get(option) or {}]
        if isinstance(targets, str) and not self._all_linear:
            asked.append(("target_modules", "fullmatch", targets))
        if isinstance(excluded, str):
            asked.append(("exclude_modules", "fullmatch", excluded))
        if config.get("layers_to_transform") not in (None, []):
            asked += [("layers_pattern", "match", layer) for layer in _layer_expressions(config)]
        # Option -> for each of its expressions, in order: matching module -> layer number.
        self._matches: dict[str, list[dict[str, str]]] = {option: [] for option, *_ in asked}
        for (option, *_), found in zip(asked, _match(asked, names), strict=True):
            self._matches[option].append(found)

    def value(self, option: str, name: str, default: Any) -> Any:
        """What ``rank_pattern`` or ``alpha_pattern`` gives a module: the first key that fits."""
        pattern = self._config.get(option) or {}
        for value, found in zip(pattern.values(), self._matches.get(option, ()), strict=True):
            if name in found:
                return value
        return pattern.get(name, default)

    def objection(self, name: str) -> str | None:
        """Why PEFT would not apply LoRA to a module, or None."""
        if name in self._shut or self._fits("exclude_modules", name):
            return "exclude_modules names it"
        if self._all_linear:
            return "all-linear leaves the head out" if name == HEAD else None
        if not self._named[name] and not self._fits("target_modules", name):
            return "target_modules does not name it"
        layers = self._config.get("layers_to_transform")
        if layers in (None, []) or name in self._targets:
            return None
        numbers = (found[name] for found in self._matches["layers_pattern"] if name in found)
        number = next(numbers, "")
        if 0 < len(number) < 10 and int(number) in (
            [layers] if isinstance(layers, int) else layers
        ):
            return None
        return "layers_to_transform leaves it out"

    def unused_targets(self) -> list[str]:
        """Entries of ``target_modules`` that no module has for an end of its path."""
        return sorted(self._targets.difference(*self._named.values()))

    @property
    def picks_layers(self) -> bool:
        """Whether the options may leave layers of the base out."""
        if self._config.get("exclude_modules") or self._config.get("layers_to_transform"):
            return True
        numbered = any(part.isdigit() for target in self._targets for part in target.split("."))
        return numbered or not (self._targets or self._all_linear)

    def _fits(self, option: str, name: str) -> bool:
        return any(name in found for found in self._matches.get(option, ()))


def _layer_expressions(config: Mapping[str, Any]) -> list[str]:
    """How PEFT finds the number of a module's layer, in group ``idx``."""
    named = config.get("layers_pattern")
    if not named:
        return [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    listed = [named] if isinstance(named, str) else named
    return [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in listed]


def _match(asked: Sequence[tuple[str, str, str]], names: Sequence[str]) -> list[dict[str, str]]:
    """Matches expressions against names in a child process.

    Args:
        asked: The option, ``match`` or ``fullmatch``, and the expression.
        names: What to match.

    Returns:
        For each expression: the names that match, and the text of its group ``idx``, if any.
    """
    if not asked:
        return []
    question = json.dumps([[ask[1:] for ask in asked], [*names]])
    command = [sys.executable or "python3", "-I", "-S", "-c", _CHILD]
    try:
        done = subprocess.run(
            command, input=question.encode(), capture_output=True, timeout=WALL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PatternError(f"{asked[0][0]} cannot be matched: {error}") from None
    answers = [json.loads(line) for line in done.stdout.splitlines(keepends=True) if b"\n" in line]
    for (option, _, expression), answer in zip(asked, answers, strict=False):
        if isinstance(answer, str):
            reason = ascii(answer)[1:-1][:100]
            raise PatternError(f"{option}: {expression!a:.80} cannot be matched ({reason})")
    if len(answers) < len(asked):
        option, _, expression = asked[len(answers)]
        raise PatternError(
            f"{option}: {expression!a:.80} takes more than {CPU_SECONDS} seconds, or too much "
            "memory, to match"
        )
    return [{names[i]: number for i, number in answer} for answer in answers]
