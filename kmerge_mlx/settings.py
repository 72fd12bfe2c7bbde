"""What the command line and the checks know of one setting.

Owns: the kinds of values a setting may have, and the one line that says why a value is none of
them. Does not know which settings there are.
"""

from __future__ import annotations

import re
from dataclasses import Field, dataclass, field
from decimal import Decimal
from typing import Any

from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.errors import short

SIZE = "size"
"""Kind of a number of bytes: a whole number, or text such as 4GB."""

MAX_INT = 2**63 - 1
"""Largest whole number that arrays, seeds and files have a place for."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", re.IGNORECASE)
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
    SIZE: "bytes, such as 4GB",
}


@dataclass(frozen=True)
class Option:
    """A setting, without its name and default.

    Args:
        kind: ``int``, ``float``, ``bool``, ``str``, ``dict``, ``list`` or ``SIZE``.
        help: One sentence.
        low: Smallest value.
        high: Largest value.
        choices: The only values.
        group: Heading in the help.
        yaml_only: Whether it has no flag.
        fixed: Whether a resumed run must have the same.
        flags: Other than the name's own.
    """

    kind: type | str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    group: str = "Training"
    yaml_only: bool = False
    fixed: bool = True
    flags: tuple[str, ...] = ()


def parse_size(text: str) -> int:
    """Bytes that a text such as ``4GB`` means; K, M, G and T are powers of 1000, as in mlx-lm."""
    number, unit = _SIZE.fullmatch(text.strip()).groups()
    return int(Decimal(number) * 1000 ** " KMGT".index(unit.upper() or " "))


def option(default: Any, kind: type | str, help: str, **more: Any) -> Any:
    """A dataclass field that carries its :class:`Option`."""
    metadata = {"option": Option(kind, help, **more)}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def option_of(field_: Field) -> Option:
    """The option that a field carries."""
    return field_.metadata["option"]


def shown(field_: Field) -> str:
    """What to call a setting in an error: its flag, or its YAML key if it has none."""
    if option_of(field_).yaml_only:
        return field_.name
    return "--" + field_.name.replace("_", "-")


def problem(field_: Field, value: Any) -> str | None:
    """What is wrong with a value, in one line, or None.

    Args:
        field_: The setting's field.
        value: What it was given; None where that is its default.
    """
    option, name = option_of(field_), shown(field_)
    if value is None and field_.default is None:
        return None
    if not _is_kind(option.kind, value) or (option.choices and value not in option.choices):
        expected = _WORDS[option.kind]
        if option.choices:
            expected = f"one of {', '.join(option.choices)}"
        return f"{name} is {short(value)}, expected {expected}"
    if option.low is not None and value < option.low:
        return f"{name} is {value}, expected at least {option.low}"
    high = MAX_INT if option.kind is int and option.high is None else option.high
    if high is not None and value > high:
        return f"{name} is {short(value)}, expected at most {high}"
    return None


def _is_kind(kind: type | str, value: Any) -> bool:
    if kind is int:
        return is_int(value, -(2**63))
    if kind is float:
        return is_number(value)
    if kind == SIZE:
        return is_int(value) or (isinstance(value, str) and bool(_SIZE.fullmatch(value.strip())))
    if kind is list:
        return isinstance(value, list | tuple)
    return isinstance(value, kind)
