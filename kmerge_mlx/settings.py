"""Declares a command's settings: default, range, flag, YAML key and help of each, in one place.

The settings of a command are a frozen dataclass below :class:`Settings`, and each field is an
:func:`option`. The checks, the YAML file and (in ``cli/inputs.py``) the flags are made from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from decimal import Decimal
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

from kmerge_mlx.config import is_int, is_number
from kmerge_mlx.errors import KMergeError, SettingsError, findings, short
from kmerge_mlx.prompts.keep import KINDS, NONE
from kmerge_mlx.prompts.policy import MERGES

INTS = "ints"  # the kind of a whole number, or of an ascending list of them, such as 2,4,8
SIZE = "size"  # the kind of a number of bytes: a whole number, or text such as 4GB
MAX_INT = 2**63 - 1  # the largest whole number that arrays, seeds and files can hold

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
    INTS: "a whole number, or several ascending ones such as 2,4,8",
    SIZE: "bytes, such as 4GB",
}


@dataclass(frozen=True)
class Option:
    """A setting, without its name and default."""

    kind: type | str  # int, float, bool, str, INTS, SIZE, list (a flag takes commas), dict (JSON)
    help: str  # one sentence
    low: float | None = None  # smallest value
    high: float | None = None  # largest value
    choices: tuple[Any, ...] = ()  # the only values
    many: bool = False  # the flag may be given several times; the value is then a tuple
    group: str | None = None  # what it is about
    flags: tuple[str, ...] = ()  # the first is in errors; default: --name-of-the-field
    argument: str | None = None  # a positional argument's name in the help; it has no flag
    required: bool = False  # the command line must name it
    yaml_only: bool = False  # it has no flag
    fixed: bool = True  # a resumed training run must have the same
    shown: str | None = None  # what the help calls the default


def option(default: Any, kind: type | str, help: str, **more: Any) -> Any:
    """A dataclass field that carries its :class:`Option`."""
    metadata = {"option": Option(kind, help, **more)}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def argument(name: str, help: str, kind: type = str, **more: Any) -> Any:
    """A positional argument, called ``name`` in the help; required unless ``required=False``."""
    more.setdefault("required", True)
    return option(() if more.get("many") else None, kind, help, argument=name, **more)


def option_of(field_: Field) -> Option:
    """The option that a field carries."""
    return field_.metadata["option"]


def flags_of(field_: Field) -> tuple[str, ...]:
    """The flags of a setting, the first of which stands for it; empty where it has none."""
    own = option_of(field_)
    if own.yaml_only or own.argument:
        return ()
    return own.flags or ("--" + field_.name.replace("_", "-"),)


def parse_size(text: str, kilo: int = 1000) -> int:
    """Bytes that a text such as ``4GB`` means; a kB is 1000 bytes, as in mlx-lm, and a KiB 1024."""
    number, unit, binary = _SIZE.fullmatch(text.strip()).groups()
    return int(Decimal(number) * (1024 if binary else kilo) ** " KMGT".index(unit.upper() or " "))


def check_output(
    name: str, path: str | Path, suffixes: Sequence[str], error: type[KMergeError] = SettingsError
) -> None:
    """Refuses a file, the value of a setting, that could not be written when the work is done."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise error(f"`{name}` is {path}, expected a name that ends with {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise error(f"`{name}` is {path}, but there is no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise error(f"`{name}` is {path}, which cannot be written: name another file")


@dataclass(frozen=True)
class Settings:
    """Base of every command's settings; a SettingsError lists everything wrong with them."""

    NAME: ClassVar[str] = "settings"
    ELSEWHERE: ClassVar[Mapping[str, str]] = {}
    """Keys of mlx-lm's files that are not settings here, with what to do instead."""

    def __post_init__(self) -> None:
        problems = [p for f in fields(self) for p in _problems(f, getattr(self, f.name))]
        if problems := problems or self.clashes():
            raise SettingsError(findings(self.NAME, problems))

    def clashes(self) -> list[str]:
        """Rules between settings that are broken, one line each."""
        return []

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> Self:
        """Makes settings from layers, the later of which win; None leaves a setting as it was."""
        known = {f.name: f for f in fields(cls)}
        items = [item for layer in layers for item in layer.items()]
        if unknown := [cls._unknown(str(name), known) for name, _ in items if name not in known]:
            raise SettingsError(findings(cls.NAME, unknown))
        given = {name: value for name, value in items if value is not None}
        for name, value in given.items():
            if option_of(known[name]).many:
                given[name] = tuple(value) if isinstance(value, list | tuple) else (value,)
        made = cls(**given)
        object.__setattr__(made, "_given", given)
        return made

    def given(self) -> dict[str, Any]:
        """The settings that somebody named, as :meth:`of` received them."""
        return getattr(self, "_given", {})

    def over(self, saved: Mapping[str, Any]) -> Self:
        """The same settings, with others in the place of those that nobody named."""
        return type(self).of(saved, self.given())

    def refuse_foreign(self, chosen: str, own: Mapping[str, tuple[str, ...]]) -> None:
        """Refuses settings of another choice (a task, say) than the ``chosen`` one.

        ``own`` holds, by choice, the settings that only some choices have.
        """
        foreign = {name for names in own.values() for name in names} - set(own[chosen])
        named = [
            f"`{f.name}` is not an option of {chosen}"
            for f in fields(self)
            # A file of --print-config names every default; a list's default is empty.
            if f.name in foreign and self.given().get(f.name, []) not in (f.default, [])
        ]
        if named:
            raise SettingsError(findings(self.NAME, named))

    @classmethod
    def setting(cls, name: str, **changed: Any) -> Any:
        """One setting of this class as a field of another, with some of its option changed."""
        found = cls.__dataclass_fields__[name]
        default = changed.pop("default", found.default)
        return field(default=default, metadata={"option": replace(option_of(found), **changed)})

    @classmethod
    def _unknown(cls, name: str, known: Mapping[str, Field]) -> str:
        if name in cls.ELSEWHERE:
            return f"{name}: {cls.ELSEWHERE[name]}"
        near = get_close_matches(name.replace("-", "_"), known, 1)
        return f"unknown setting {short(name)}" + (f", did you mean {near[0]}?" if near else "")


def _problems(field_: Field, value: Any) -> Iterator[str]:
    """What is wrong with the value of a setting; a default of None is right."""
    own = option_of(field_)
    if value is None and field_.default is None:
        return
    name, choices = own.argument or f"`{field_.name}`", ", ".join(map(str, own.choices))
    high = MAX_INT if own.kind is int and own.high is None else own.high
    several = own.many and isinstance(value, tuple)
    for each in value if several else (value,):
        items = each if own.kind is list and isinstance(each, list | tuple) else [each]
        if not _is_kind(own.kind, each) or (choices and any(i not in own.choices for i in items)):
            some = "some" if own.kind is list else "one"
            expected = f"{some} of {choices}" if choices else _WORDS[own.kind]
            texts = items is each and all(isinstance(i, str) for i in items)
            yield f"{name} is {short(','.join(items) if texts else each)}, expected {expected}"
        elif own.low is not None and _ends(each)[0] < own.low:
            yield f"{name} is {each}, expected at least {own.low}"
        elif high is not None and _ends(each)[-1] > high:
            yield f"{name} is {short(each)}, expected at most {high}"
        # Bytes of the command line that are not text come as lone surrogates.
        elif isinstance(each, str) and re.search("[\ud800-\udfff]", each):
            yield f"{name} is not UTF-8"


def _ends(value: Any) -> Sequence[Any]:
    """A value between its smallest and its largest number: itself, where it is one."""
    return value if isinstance(value, list | tuple) else (value,)


def _is_kind(kind: type | str, value: Any) -> bool:
    if kind is float:
        return is_number(value)
    if kind == INTS and isinstance(value, list | tuple):
        whole = len(value) > 1 and all(is_int(each, -(2**63)) for each in value)
        return whole and all(one < two for one, two in pairwise(value))
    if kind in (int, INTS):
        return is_int(value, -(2**63))
    if kind == SIZE:
        return is_int(value) or (isinstance(value, str) and bool(_SIZE.fullmatch(value.strip())))
    return isinstance(value, list | tuple if kind is list else kind)


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which base model and adapter a command uses."""

    model: str | None = option(
        None,
        str,
        "Base model: a folder or a Hugging Face repo id (user/name@revision). Default: the one the "
        "adapter names; without an adapter, the bundled model.",
        fixed=False,
    )
    adapter_path: str | None = option(
        None,
        str,
        "Adapter folder, as `kmerge-mlx convert` writes it, or a hub repo of one "
        "(user/name@revision). Default: the one that the model's folder carries, if any.",
        fixed=False,
    )
    k: Any = option(
        None,
        int,
        "Merge factor K: how many tokens one position stands for. Default: the only one there is; "
        "of the bundled model's, 4.",
        low=1,
        flags=("--k", "--merge-factor"),
    )
    trust_remote_code: bool = option(
        False, bool, "Let the base model's own Python files run.", fixed=False
    )


@dataclass(frozen=True)
class LayoutSettings(Settings):
    """What of a prompt merges, and whether the chat template applies."""

    merges: str | None = option(
        None,
        str,
        "What merges where nothing is said: documents (long texts beside a question), contexts (as "
        "up to 0.1.0), or all, chat template and question too. (A FILE beside a --prompt always "
        "merges, and that prompt never.) Default: as the adapter was trained.",
        choices=MERGES,
    )
    merge_threshold: int | None = option(
        None,
        int,
        "Fewest tokens of a conversation's text that merges. Default: as the adapter was trained.",
        low=1,
    )
    chat_template: bool | None = option(
        None,
        bool,
        "Wrap the text in the tokenizer's chat template, or use it bare. Default: as the adapter "
        "was trained.",
        flags=("--apply-chat-template/--ignore-chat-template",),
    )
    keep: Any = option(
        None,
        list,
        f"Exact strings that stay raw inside of what merges: {', '.join(KINDS)}; or {NONE}. "
        "Default: as the adapter was trained.",
        choices=(*KINDS, NONE),
    )


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How tokens are chosen: the options of ``mlx_lm.generate`` that a server has too."""

    temp: float = option(0.0, float, "Sampling temperature; 0 is greedy.", low=0)
    top_p: float = option(1.0, float, "Sampling top-p.", low=0, high=1)
    min_p: float = option(0.0, float, "Sampling min-p.", low=0, high=1)
    top_k: int = option(0, int, "Sampling top-k; 0 is off.", low=0)


@dataclass(frozen=True)
class CacheSettings(Settings):
    """How prompts are prefilled, and how KV caches are kept."""

    kv_bits: int | None = option(
        None, int, "Bits to quantize the KV cache to.", choices=(2, 3, 4, 5, 6, 8)
    )
    kv_group_size: int = option(64, int, "Group size of --kv-bits.", choices=(32, 64, 128))
    quantized_kv_start: int = option(5000, int, "Position from which --kv-bits applies.", low=0)
    prefill_step_size: int = option(2048, int, "Positions prefilled at once.", low=1)
