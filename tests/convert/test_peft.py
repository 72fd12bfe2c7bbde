"""PEFT adapters: every option is honoured as PEFT honours it, or refused by name.

The oracle is PEFT itself where it can be asked: its saved files, its ``get_delta_weight``, its own
list of options. Hand-made tensors and configs show what PEFT would not write.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.adapters.schema import LoRAConfig, LoRASpec
from kmerge_mlx.convert.checkpoint import named_head
from kmerge_mlx.convert.names import PREFIX
from kmerge_mlx.convert.peft import HARMLESS, HONOURED, NameRules, lora_from_peft
from kmerge_mlx.errors import KMergeError
from kmerge_mlx.files import read_json, read_safetensors
from tests.checkpoints import CONFIG
from tests.conversions import specs

Q, V, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"


def tensors(*modules: str, rank: int = 4, inner: int = 8, out: int = 6) -> dict[str, mx.array]:
    """LoRA tensors under PEFT's names."""
    made = {}
    for name in modules:
        made[f"{PREFIX}{name}.lora_A.weight"] = mx.random.normal((rank, inner))
        made[f"{PREFIX}{name}.lora_B.weight"] = mx.random.normal((out, rank))
    return made


def layered(*inside: str, layers: tuple[int, ...] = (0, 1), **sizes: int) -> dict[str, mx.array]:
    names = [f"model.layers.{layer}.{name}" for layer in layers for name in inside]
    return tensors(*names, **sizes)


def config(**options: object) -> dict[str, object]:
    return CONFIG | {"target_modules": ["q_proj"]} | options


def converted(options: object, weights: dict[str, mx.array], **known: object):
    problems: list[str] = []
    lora = lora_from_peft(options, weights, problems, **known)
    assert not problems
    return lora


def refused(options: object, weights: dict[str, mx.array] | None = None) -> list[str]:
    problems: list[str] = []
    weights = layered(Q) if weights is None else weights
    assert lora_from_peft(options, weights, problems) is None
    assert problems
    assert all(p and "\n" not in p for p in problems)
    return problems


AUTHORS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Makes real PEFT adapters: a function from LoraConfig options to (config, tensors, model)."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def make_adapter(**options):
        torch.manual_seed(0)
        sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24}
        heads = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
        base = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=True))
        base.name_or_path = ""  # PEFT would ask the hub for it
        plain = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
        model = peft.get_peft_model(base, peft.LoraConfig(**plain | options))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_()
        folder = tmp_path_factory.mktemp("peft")
        model.save_pretrained(folder)
        saved = read_json(folder / "adapter_config.json", KMergeError)
        return saved, read_safetensors(folder / "adapter_model.safetensors", KMergeError), model

    torch.set_num_threads(1)
    return make_adapter


def deltas_by_peft(model) -> dict[str, np.ndarray]:
    """What PEFT adds to each base weight, (out, in)."""
    return {
        name: module.get_delta_weight("default").detach().numpy()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def deltas(lora) -> dict[str, np.ndarray]:
    """What the conversion adds to each base weight, (out, in)."""
    found, weights = {}, lora.tuning_weights | named_head(lora)
    for name, (rank, scale) in specs(lora).items():
        a, b = (np.array(weights[f"{name}.{part}"]) for part in ("lora_a", "lora_b"))
        assert a.shape[1] == b.shape[0] == rank
        found[name] = scale * (a @ b).T
    return found


HONOURED_CASES = {
    "as_the_authors_train": {"target_modules": AUTHORS},
    "rslora": {"use_rslora": True, "r": 3},
    "the_head_alone": {"target_modules": ["lm_head"]},
    "patterns_that_overlap": {
        "target_modules": AUTHORS,
        "use_rslora": True,
        "rank_pattern": {r".*\.1\..*": 2, "layers.1.self_attn.q_proj": 7, "q_proj": 5},
        "alpha_pattern": {"[qk]_proj": 3, "k_proj": 5, r"self_attn\.(v|o)_proj": 9},
    },
    "a_rank_pattern_that_names_a_layer": {"rank_pattern": {r"layers\.(0|2)\..*": 2}},
    "layers_to_transform": {"target_modules": AUTHORS, "layers_to_transform": [0, 2]},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "a_regex": {"target_modules": r".*layers\.[01]\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
    "all_linear": {"target_modules": "all-linear"},
    "exclude_modules": {"target_modules": AUTHORS, "exclude_modules": ["v_proj", "lm_head"]},
    "gaussian_init": {"init_lora_weights": "gaussian"},
    "loftq_config_that_peft_ignores": {"loftq_config": {"loftq_bits": 4}},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("case", HONOURED_CASES)
def test_the_conversion_adds_what_peft_adds(real, case):
    """Tolerance: one float32 product of rank at most 7, of numbers near 1."""
    saved, weights, model = real(**HONOURED_CASES[case])
    expected, found = deltas_by_peft(model), deltas(converted(saved, weights))
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)


REFUSED = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [1],
}


@pytest.mark.filterwarnings("ignore")
def test_a_real_adapter_with_an_option_that_cannot_be_kept_is_refused_by_name(real):
    for option, value in REFUSED.items():
        saved, weights, _ = real(**{option: value})
        (problem,) = refused(saved, weights)
        assert problem.startswith(f"adapter_config.json: {option} = ")
    saved, weights, _ = real(target_modules=["embed_tokens", "q_proj"])
    problems = refused(saved, weights)
    assert any("lora_embedding_A" in p and "retrain without it" in p for p in problems)


def test_tensors_of_refused_kinds_are_named_even_where_the_config_hides_them():
    name = f"{PREFIX}model.layers.0.{Q}"
    for tensor, why in (
        (f"{name}.lora_magnitude_vector.default.weight", "DoRA"),
        (f"{name}.modules_to_save.default.weight", "modules_to_save=None"),
        (f"{name}.lora_B.default.bias", "lora_bias=False"),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", "LoRA on the embedding"),
        (f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable tokens"),
        (f"{PREFIX}model.embed_tokens.weight", "is not part of a LoRA"),
    ):
        (problem,) = refused(config(), layered(Q) | {tensor: mx.zeros((3, 3))})
        assert tensor in problem
        assert why in problem


BAD_VALUES = {
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "init_lora_weights": ["olora", "corda", "loftq", "lora_ga", "pissa_niter_16", "of_2031", []],
    "megatron_config": [{"a": 1}],
    "of_2031": [True, {"nested": [1]}],
    "bias": ["lora_only", None],
    "r": [0, 2.5, None, True],
    "lora_alpha": ["16", None, 10**400],
    "lora_dropout": [1.0, -0.1, "0.05"],
    "use_rslora": ["false"],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": 2.0}, ["q_proj"]],
    "alpha_pattern": [{"q_proj": "8"}, {"q_proj": None}],
    "target_modules": [None, {"q_proj": 1}, ["q_proj", 7]],
    "layers_to_transform": ["all", [0, "1"], [True], -1],
}


def test_an_option_that_cannot_be_honoured_is_refused_by_name():
    for option, values in BAD_VALUES.items():
        for value in values:
            problems = refused(config(**{option: value}))
            assert any(p.startswith(f"adapter_config.json: {option} = ") for p in problems), value


def test_every_option_of_this_peft_is_known_or_refused_when_it_is_set():
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields >= HONOURED
    for name in fields - HARMLESS - HONOURED:
        assert f"adapter_config.json: {name} = " in refused(config(**{name: {"x": 1}}))[0]


def test_options_that_are_absent_or_off_are_not_in_the_way():
    old = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
    off = {"of_2031": None, "of_2032": False, "of_2033": [], "of_2034": {}, "of_2035": ""}
    assert converted(old | off, layered(Q)).tuning.uniform.scale == 4


def test_a_config_of_another_kind_is_refused_by_its_name():
    """Those of PEFT's other methods, mlx-lm's own, and what is not a config at all."""
    peft = pytest.importorskip("peft")
    for other in (peft.IA3Config(), peft.LoHaConfig(), peft.PrefixTuningConfig()):
        kind = other.peft_type.value
        (problem,) = refused({"peft_type": kind})
        assert problem == f"adapter_config.json is of type '{kind}'; only LORA adapters convert"
    (problem,) = refused({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {}})
    assert "has no peft_type: it is not PEFT's" in problem
    for content in (None, [], "LORA", 3):
        assert refused(content) == ["adapter_config.json does not hold an object"]


def test_a_pattern_and_layers_do_not_go_together_as_in_peft():
    options = config(target_modules=".*q_proj", layers_to_transform=[0])
    (problem,) = refused(options)
    assert "layers_to_transform does not go with target_modules as one pattern" in problem
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a str"):
        pytest.importorskip("peft").LoraConfig(target_modules=".*q", layers_to_transform=[0])


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


# The tensors, and the form of LoRA config they are written in


def test_a_raw_state_dict_with_the_adapters_name_converts_the_same():
    weights = layered(Q)
    raw = {name.replace(".weight", ".default.weight"): array for name, array in weights.items()}
    plain, named = converted(config(), weights), converted(config(), raw)
    assert plain.tuning == named.tuning
    assert all(
        mx.array_equal(plain.tuning_weights[n], named.tuning_weights[n])
        for n in plain.tuning_weights
    )


A, B = (f"{PREFIX}model.layers.0.{Q}.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({A.replace(".weight", ".default.weight"): (4, 8)}, "is there under two names"),
        ({f"module.{A}": (4, 8)}, "is there under two names"),
        ({f"{p}{PREFIX}lm_head.base_layer.weight": (3, 8) for p in ("", "module.")}, "two names"),
        ({B: None}, f"model.layers.0.{Q}.lora_B.weight is missing"),
        ({A: (5, 8), B: (6, 5)}, "the tensors have rank 5, the config says 4"),
        ({B: (6, 5)}, "lora_A (4, 8) and lora_B (6, 5) do not fit together"),
        ({A: ()}, "has shape (), expected (r, in) or (out, r)"),
        ({A: (4, 8, 1)}, "has shape (4, 8, 1), expected (r, in) or (out, r)"),
        ({A: (0, 8)}, "has shape (0, 8), expected (r, in) or (out, r)"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_by_name(changed, complaint):
    weights = layered(Q)
    for name, shape in changed.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = mx.zeros(shape)
    assert complaint in refused(config(), weights)[0]


def test_an_adapter_without_tensors_is_refused():
    empty, unused = refused(config(), {})
    assert empty.startswith("the adapter holds no LoRA tensors (DeepSpeed's ZeRO-3 writes such")
    assert unused == (
        "target_modules names 'q_proj', but no tensor belongs to it (if the base has no such "
        "module, remove it from adapter_config.json)"
    )


def test_options_of_ms_swifts_optimizer_change_nothing():
    """As ms-swift 4 writes them (``swift/tuners/lora.py``)."""
    swift = {"lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06}
    assert converted(config(**swift), layered(Q)).tuning == converted(config(), layered(Q)).tuning


def test_the_same_lora_in_every_layer_takes_mlx_lms_form():
    lora = converted(config(target_modules=["q_proj", "v_proj"]), layered(Q, V))
    assert set(lora.tuning.keys) == {Q, V}
    assert replace(lora.tuning, keys=()) == LoRAConfig(2, 0.05, LoRASpec(4, 4.0))


def test_first_layers_alone_are_never_written_as_last_layers():
    """mlx-lm counts layers from the last: with a third layer it would adapt the wrong two."""
    for options in (
        {"target_modules": r"model\.layers\.[01]\.self_attn\.q_proj"},
        {"target_modules": ["0.self_attn.q_proj", "1.self_attn.q_proj"]},
        {"layers_to_transform": [0, 1]},
        {"exclude_modules": r".*\.2\..*"},
    ):
        for layers in (None, 3, 2):
            found = converted(config(**options), layered(Q), num_layers=layers).tuning
            assert found.num_layers == 2
            assert (found.uniform is None) == (layers != 2)
            assert found.uniform or set(found.modules) == {f"model.layers.{i}.{Q}" for i in (0, 1)}


def test_different_ranks_gaps_or_stacks_are_written_module_by_module():
    weights = layered(Q, layers=(0,)) | layered(Q, layers=(1,), rank=2)
    lora = converted(config(rank_pattern={"layers.1.self_attn.q_proj": 2}), weights)
    assert lora.tuning.modules == {
        f"model.layers.0.{Q}": LoRASpec(4, 4.0),
        f"model.layers.1.{Q}": LoRASpec(2, 8.0),
    }
    gap = converted(config(), layered(Q, layers=(0, 2))).tuning
    assert (gap.num_layers, len(gap.modules)) == (3, 2)
    stacks = layered(Q) | tensors(f"vision.layers.0.{Q}", f"vision.layers.1.{Q}")
    assert len(converted(config(), stacks).tuning.modules) == 4


def test_the_head_is_kept_apart_unless_the_base_is_known_to_have_one():
    weights = layered(Q) | tensors("lm_head")
    options = config(target_modules=["q_proj", "lm_head"])
    apart = converted(options, weights)
    assert (apart.merge.head_lora, apart.tuning.keys) == (LoRASpec(4, 4.0), (Q,))
    assert set(apart.head_weights) == {"lora_a", "lora_b"}
    within = converted(options, weights, head_is_a_layer=True, num_layers=2)
    assert (within.merge.head_lora, set(within.tuning.keys)) == (None, {Q, "lm_head"})
    assert "lm_head.lora_a" in within.tuning_weights
