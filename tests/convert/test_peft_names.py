"""Which modules a PEFT config means: its lists and its patterns.

The oracle is PEFT's two matching functions, asked about the same names and patterns.
"""

from __future__ import annotations

import itertools
import random

import pytest

from kmerge_mlx.convert.peft import NameRules
from tests.peft_adapters import DOWN, Q, config, converted, layered, refused, tensors

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
        rules = NameRules(config(rank_pattern=pattern, alpha_pattern=pattern))
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


def test_a_module_is_a_target_exactly_where_peft_says_so():
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    for options in TARGET_OPTIONS:
        theirs = peft.LoraConfig(**options)
        rules = NameRules(config(**options))
        for name in NAMES:
            found = tuners.check_target_module_exists(theirs, name)
            excluded = isinstance(found, tuners._ExcludedModule)
            expected = bool(found) and not excluded
            assert (rules.objection(name) is None) == expected, (options, name)


def test_tensors_that_peft_would_not_apply_are_refused():
    for options, complaint in (
        ({"layers_to_transform": [0]}, "layers_to_transform leaves it out"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "exclude_modules names it"),
        ({"target_modules": r".*\.0\..*"}, "target_modules does not name it"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, "target_modules does not name it"),
    ):
        (problem,) = refused(config(**options))
        assert problem == f"model.layers.1.{Q} has LoRA tensors, but {complaint}"
    (problem,) = refused(config(target_modules=["q_proj", "c_attn"]))
    assert "target_modules names 'c_attn', but no tensor belongs to it" in problem


def test_all_linear_leaves_the_head_out_as_in_peft():
    options = config(target_modules="all-linear")
    assert converted(options, layered(Q, DOWN)).tuning.num_layers == 2
    (problem,) = refused(options, layered(Q) | tensors("lm_head"))
    assert "all-linear leaves the head out" in problem


def test_a_pattern_that_is_invalid_or_takes_all_memory_is_refused():
    for pattern in (
        *("(" * 5000 + ")" * 5000, "a{99999999999}", "(?R)", "[z-a]", "("),
        *("(((((){1000}){1000}){1000}){1000}){1000}", "((((a{0,1000}){0,1000}){0,9999}){5,})x"),
    ):
        for options in ({"rank_pattern": {pattern: 4}}, {"target_modules": pattern}):
            (problem,) = refused(config(**options))
            assert problem.startswith(f"adapter_config.json: {next(iter(options))}: ")
            assert "is not valid" in problem
            assert len(problem) < 300
