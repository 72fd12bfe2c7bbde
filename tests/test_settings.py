"""Settings: checked when they are made, in layers, everything wrong listed at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from kmerge_mlx.errors import SettingsError
from kmerge_mlx.settings import (
    MAX_INT,
    SIZE,
    ModelSettings,
    Settings,
    argument,
    option,
    parse_size,
)


@dataclass(frozen=True)
class Baking(Settings):
    """Settings of every kind."""

    NAME = "bake"
    ELSEWHERE: ClassVar = {"oven": "there is one oven: remove it"}

    flour: str = argument("FLOUR", "What to bake.")
    eggs: int = option(2, int, "How many.", low=0, high=12)
    sugar: float = option(0.5, float, "Cups.", low=0)
    form: str = option("round", str, "Shape.", choices=("round", "square"))
    glazed: bool = option(False, bool, "With a glaze.")
    memory: Any = option("4GB", SIZE, "Bytes.")
    steps: tuple[int, ...] = option((1, 2), int, "Steps.", many=True, low=1)
    extra: Any = option({}, dict, "Anything.", yaml_only=True)
    names: Any = option(None, list, "Names.", flags=("--names", "-n"))

    def clashes(self) -> list[str]:
        return ["`glazed` needs `sugar`"] if self.glazed and not self.sugar else []


def refused(**values: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        Baking.of({"flour": "rye"} | values)
    return str(caught.value)


def test_a_value_that_cannot_be_is_named_with_what_is_expected():
    for values, text in (
        ({"eggs": 13}, "bake: `eggs` is 13, expected at most 12"),
        ({"eggs": -1}, "`eggs` is -1, expected at least 0"),
        ({"eggs": 2.0}, "`eggs` is 2.0, expected a whole number"),
        ({"eggs": True}, "`eggs` is True, expected a whole number"),
        ({"sugar": "x"}, "`sugar` is 'x', expected a number"),
        ({"sugar": float("nan")}, "`sugar` is nan, expected a number"),
        ({"form": "oval"}, "`form` is 'oval', expected one of round, square"),
        ({"glazed": 1}, "`glazed` is 1, expected true or false"),
        ({"memory": "4 gallons"}, "`memory` is '4 gallons', expected bytes, such as 4GB"),
        ({"steps": [1, 0]}, "`steps` is 0, expected at least 1"),
        ({"extra": []}, "`extra` is [], expected a mapping"),
        ({"names": 3}, "`names` is 3, expected a list"),
        ({"flour": 3}, "FLOUR is 3, expected text"),
        ({"flour": "\udc80"}, "FLOUR is not UTF-8"),
        ({"glazed": True, "sugar": 0}, "`glazed` needs `sugar`"),
    ):
        assert text in refused(**values)
    assert refused(eggs=13, sugar=-1).splitlines() == [
        "bake: 2 problems",
        "  - `eggs` is 13, expected at most 12",
        "  - `sugar` is -1, expected at least 0",
    ]
    with pytest.raises(SettingsError, match="expected at most"):
        ModelSettings(k=MAX_INT + 1)


def test_unknown_names_say_what_is_near_or_what_to_do():
    assert "unknown setting 'egs', did you mean eggs?" in refused(egs=3)
    assert "oven: there is one oven: remove it" in refused(oven=1)
    assert "unknown setting 'xyz'" in refused(xyz=None)


def test_later_layers_win_and_none_leaves_a_setting_as_it_was():
    made = Baking.of({"flour": "rye", "eggs": 3, "sugar": 1}, {"eggs": 4, "sugar": None})
    assert (made.eggs, made.sugar) == (4, 1)
    assert made.given() == {"flour": "rye", "eggs": 4, "sugar": 1}
    assert (made.steps, made.extra, made.names) == ((1, 2), {}, None)
    assert made.extra is not Baking("rye").extra
    assert Baking.of({"flour": "rye", "steps": 3}).steps == (3,)
    assert Baking.of({"flour": "rye", "steps": [3, 4]}).steps == (3, 4)
    resumed = made.over({"flour": "oat", "form": "square"})
    assert (resumed.flour, resumed.eggs, resumed.form) == ("rye", 4, "square")


def test_settings_of_another_choice_are_refused_if_they_were_named():
    own = {"cake": ("sugar",), "bread": ("eggs", "form")}
    made = Baking.of({"flour": "rye", "eggs": 1})
    made.refuse_foreign("bread", own)
    with pytest.raises(SettingsError, match="`eggs` is not an option of cake"):
        made.refuse_foreign("cake", own)


def test_sizes_are_powers_of_1000():
    for text, size in (("4GB", 4e9), ("1.5 kB", 1500), ("7", 7), ("2 TiB", 2**41), ("0.1M", 1e5)):
        assert parse_size(text) == size
