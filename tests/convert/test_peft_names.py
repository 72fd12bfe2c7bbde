"""Which modules a PEFT config means: its lists, its patterns, and patterns that never end.

The oracle is PEFT's two matching functions, asked about the same names and patterns.
"""

from __future__ import annotations

import itertools
import random
import time

import pytest

from kmerge_mlx.convert.patterns import NameRules
from kmerge_mlx.convert.peft import lora_from_peft
from tests.peft_adapters import DOWN, Q, V, config, converted, layered, refused, tensors

# ---- names, with PEFT's two matching functions as the oracle ----

NAMES = [
    "lm_head",
    *(f"model.layers.{i}.{p}" for i in (0, 1, 2, 11) for p in (Q, "self_attn.qq_proj", DOWN)),
    "model.layers.1.experts.0.up_proj",
    "model.vision.blocks.3.layers.1.attn.q_proj",
    "layers.0.q_proj",
    "model.layers.0.odd+name",
]
KEYS = [
    *("q_proj", "lm_head", "proj", ".*", "layers.1.mlp.down_proj", "[qk]_proj", r"\w+_proj"),
    *(r"layers\.\d+\.mlp\..*", r"model\.layers\.(0|2)\..*", "(?:self_attn|mlp)[.].*", "a|b"),
    *(r"self_attn\.q{1,2}_proj", "model.layers.0.odd+name", "^lm_head", "q_proj$", r"q_proj\b"),
    *("layers.1", "head", "", "mlp.down_proj|self_attn.q_proj", "down_proj)|(lm_head"),
]


def test_rank_and_alpha_patterns_pick_what_peft_picks():
    other = pytest.importorskip("peft.utils.other")
    draw = random.Random(5)
    for _ in range(40):
        keys = draw.sample(KEYS, draw.randint(1, 6))
        pattern = {key: rank for rank, key in enumerate(keys, 1)}
        rules = NameRules(config(rank_pattern=pattern, alpha_pattern=pattern), NAMES)
        for name, option in itertools.product(NAMES, ("rank_pattern", "alpha_pattern")):
            expected = pattern.get(other.get_pattern_key(pattern.keys(), name), 99)
            assert rules.value(option, name, 99) == expected, (name, keys)


TARGET_OPTIONS = [
    *({"target_modules": [key]} for key in KEYS if key not in ("", ".*")),
    *({"target_modules": key} for key in KEYS if key and ")|(" not in key),
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": "blocks"},
    {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": ["x", "bl.*s"]},
    {"target_modules": ["layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["head", "self_attn.q_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r".*\.[01]\..*"},
    {"target_modules": ".*q_proj", "exclude_modules": "lm_head|.*vision.*"},
]


@pytest.mark.parametrize("options", TARGET_OPTIONS, ids=str)
def test_a_module_is_a_target_exactly_where_peft_says_so(options):
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(**options)
    rules = NameRules(config(**options), NAMES)
    for name in NAMES:
        found = tuners.check_target_module_exists(theirs, name)
        excluded = isinstance(found, tuners._ExcludedModule)
        assert (rules.objection(name) is None) == (bool(found) and not excluded), name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"layers_to_transform": [0]}, "layers_to_transform leaves it out"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "exclude_modules names it"),
        ({"target_modules": r".*\.0\..*"}, "target_modules does not name it"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, "target_modules does not name it"),
    ],
)
def test_tensors_that_peft_would_not_apply_are_refused(options, complaint):
    (problem,) = refused(config(**options))
    assert problem == f"model.layers.1.{Q} has LoRA tensors, but {complaint}"


def test_all_linear_leaves_the_head_out_as_in_peft():
    options = config(target_modules="all-linear")
    assert converted(options, layered(Q, DOWN)).config.num_layers == 2
    (problem,) = refused(options, layered(Q) | tensors("lm_head"))
    assert "all-linear leaves the head out" in problem


def test_a_target_without_tensors_is_refused_with_what_to_do():
    (problem,) = refused(config(target_modules=["q_proj", "c_attn"]))
    assert "target_modules names 'c_attn', but no tensor belongs to it" in problem
    assert "remove it from adapter_config.json" in problem


HOSTILE = "model.layers.0." + "a" * 60 + "!"


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"(a+)+": 4}},
        {"alpha_pattern": {"(a|aa)+": 4}},
        {"target_modules": "model.layers.0.(a+)+$"},
        {"exclude_modules": "(.*a){40}"},
        {"layers_pattern": "(.+)+", "layers_to_transform": [0]},
        {"rank_pattern": {f"(a|a{i})*": 4 for i in range(3)} | {"(.|.)*x": 4}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_pattern_that_never_ends_is_refused_in_seconds(options):
    start = time.perf_counter()
    (problem,) = refused(config(**{"target_modules": [HOSTILE]} | options), tensors(HOSTILE))
    assert next(iter(options)) in problem
    assert "takes more than 2 seconds" in problem
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "pattern",
    [
        "(" * 5000 + ")" * 5000,
        "((((a{1000}){1000}){1000}){1000}){1000}",
        "((((a{0,1000}){0,1000}){0,1000}){0,1000}){0,1000}x",
        "a{99999999999}",
        "(?R)",
        "[z-a]",
        "(",
        "\ud800",
        "x" * 200_000,
    ],
    ids=lambda pattern: ascii(pattern)[:40],
)
def test_a_strange_pattern_is_answered_or_refused_but_never_costs_this_process(pattern):
    start = time.perf_counter()
    problems: list[str] = []
    lora_from_peft(config(rank_pattern={pattern: 4}), layered(Q), problems)
    assert len(problems) <= 1
    assert all(p.startswith("adapter_config.json: rank_pattern: ") for p in problems)
    assert all(len(p) < 300 for p in problems)
    assert time.perf_counter() - start < 10


def test_the_many_patterns_of_a_large_model_take_no_time():
    names = [f"model.layers.{i}.{p}" for i in range(80) for p in (Q, V, DOWN, "mlp.up_proj")]
    pattern = {name: 1 + i % 5 for i, name in enumerate(names)}
    start = time.perf_counter()
    rules = NameRules(config(rank_pattern=pattern, alpha_pattern=pattern), names)
    assert [rules.value("rank_pattern", name, 0) for name in names] == [*pattern.values()]
    assert time.perf_counter() - start < 3


def test_plain_configs_start_no_other_process(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("started a process")

    monkeypatch.setattr("subprocess.run", fail)
    assert converted(config(), layered(Q))
