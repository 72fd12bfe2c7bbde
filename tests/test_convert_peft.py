"""PEFT adapters: every option is honoured as PEFT honours it, or refused by name.

The oracle is PEFT itself where it can be asked: its saved files, its ``get_delta_weight``, its two
matching functions. Hand-made tensors show what PEFT would not write.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import time

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.convert.patterns import NameRules
from kmerge_mlx.convert.peft import HARMLESS, HONOURED, PREFIX, lora_from_peft
from kmerge_mlx.errors import KMergeError
from kmerge_mlx.files import read_json, read_safetensors
from tests.checkpoints import CONFIG, make

Q, V, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
AUTHORS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


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


# ---- what PEFT trains and saves ----


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Makes real PEFT adapters: a function from LoraConfig options to (config, tensors, model)."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def make_adapter(**options):
        torch.manual_seed(0)
        base = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=48,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                tie_word_embeddings=True,
            )
        )
        base.name_or_path = ""  # PEFT would ask the hub for it
        lora = peft.LoraConfig(
            **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
            | options
        )
        model = peft.get_peft_model(base, lora)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_()
        folder = tmp_path_factory.mktemp("peft")
        model.save_pretrained(folder)
        saved = read_json(folder / "adapter_config.json", KMergeError)
        return saved, read_safetensors(folder / "adapter_model.safetensors", KMergeError), model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_adapter
    torch.set_num_threads(threads)


def deltas_by_peft(model) -> dict[str, np.ndarray]:
    """What PEFT adds to each base weight, (out, in)."""
    return {
        name: module.get_delta_weight("default").detach().numpy()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def deltas(lora) -> dict[str, np.ndarray]:
    """What the conversion adds to each base weight, (out, in)."""
    found = {}
    specs = dict(lora.config.modules)
    weights = dict(lora.weights)
    if lora.head is not None:
        specs["lm_head"] = lora.head
        weights |= {f"lm_head.{name}": array for name, array in lora.head_weights.items()}
    for name in {n.rsplit(".", 1)[0] for n in weights}:
        spec = specs.get(name) or lora.config.uniform
        a, b = (np.array(weights[f"{name}.{part}"]) for part in ("lora_a", "lora_b"))
        assert a.shape[1] == b.shape[0] == spec.rank
        found[name] = spec.scale * (a @ b).T
    return found


HONOURED_CASES = {
    "as_the_authors_train": {"target_modules": AUTHORS},
    "rslora": {"use_rslora": True, "r": 3},
    "the_head_alone": {"target_modules": ["lm_head"]},
    "alpha_below_rank": {"lora_alpha": 0.5},
    "a_rank_pattern_by_suffix": {
        "target_modules": AUTHORS,
        "rank_pattern": {"q_proj": 2, "lm_head": 6, "layers.1.mlp.up_proj": 3},
    },
    "patterns_that_overlap": {
        "target_modules": AUTHORS,
        "use_rslora": True,
        "rank_pattern": {r".*\.1\..*": 2, "layers.1.self_attn.q_proj": 7, "q_proj": 5},
        "alpha_pattern": {"[qk]_proj": 3, "k_proj": 5, r"self_attn\.(v|o)_proj": 9},
    },
    "a_rank_pattern_that_names_a_layer": {"rank_pattern": {r"layers\.(0|2)\..*": 2}},
    "layers_to_transform": {"target_modules": AUTHORS, "layers_to_transform": [0, 2]},
    "layers_to_transform_as_one_number": {"layers_to_transform": 1},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers_pattern_as_a_list": {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "a_suffix_with_its_parent": {"target_modules": ["self_attn.q_proj", "2.mlp.up_proj"]},
    "full_names": {"target_modules": ["model.layers.0.self_attn.q_proj", "lm_head"]},
    "a_regex": {"target_modules": r".*layers\.[01]\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
    "a_regex_with_a_lookahead": {"target_modules": r"^(?!.*self_attn).*_proj$"},
    "all_linear": {"target_modules": "all-linear"},
    "exclude_modules": {"target_modules": AUTHORS, "exclude_modules": ["v_proj", "lm_head"]},
    "exclude_modules_by_regex": {"target_modules": AUTHORS, "exclude_modules": r".*\.2\..*"},
    "gaussian_init": {"init_lora_weights": "gaussian"},
    "orthogonal_init": {"init_lora_weights": "orthogonal"},
    "no_init": {"init_lora_weights": False},
    "mica_init": {"init_lora_weights": "mica"},
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


REFUSED_CASES = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", REFUSED_CASES)
def test_a_real_adapter_with_an_option_that_cannot_be_kept_is_refused_by_name(real, option):
    saved, weights, _ = real(**REFUSED_CASES[option])
    (problem,) = refused(saved, weights)
    assert problem.startswith(f"adapter_config.json: {option} = ")


@pytest.mark.filterwarnings("ignore")
def test_lora_on_the_embedding_is_refused_by_tensor(real):
    saved, weights, _ = real(target_modules=["embed_tokens", "q_proj"])
    problems = refused(saved, weights)
    assert any("lora_embedding_A" in p and "retrain without it" in p for p in problems)


def test_tensors_of_refused_kinds_are_named_even_where_the_config_hides_them():
    name = f"{PREFIX}model.layers.0.{Q}"
    for tensor, why in (
        (f"{name}.lora_magnitude_vector", "DoRA"),
        (f"{name}.lora_magnitude_vector.default.weight", "DoRA"),
        (f"{name}.modules_to_save.default.weight", "modules_to_save=None"),
        (f"{name}.lora_B.bias", "lora_bias=False"),
        (f"{name}.lora_B.default.bias", "lora_bias=False"),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", "LoRA on the embedding"),
        (f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable tokens"),
        (f"{PREFIX}model.layers.0.self_attn.q_proj.bias", "is not part of a LoRA"),
        (f"{PREFIX}model.embed_tokens.weight", "is not part of a LoRA"),
        ("prompt_embeddings", "is not part of a LoRA"),
    ):
        (problem,) = refused(config(), layered(Q) | {tensor: mx.zeros((3, 3))})
        assert tensor in problem
        assert why in problem


# ---- options, by hand ----


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "of_2031"),
        ("init_lora_weights", []),
        ("megatron_config", {"a": 1}),
        ("arrow_config", {"top_k": 3}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1.0}),
        ("velora_config", {"num_groups": 1}),
        ("monteclora_config", {"num_samples": 1}),
        ("of_2031", True),
        ("of_2031", {"nested": [1]}),
        ("bias", "lora_only"),
        ("bias", None),
        ("r", 0),
        ("r", 2.5),
        ("r", None),
        ("r", True),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", 10**400),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", "0.05"),
        ("use_rslora", "false"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "8"}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_modules", None),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", ["q_proj", 7]),
        ("exclude_modules", [None]),
        ("layers_pattern", 3),
        ("layers_to_transform", "all"),
        ("layers_to_transform", [0, "1"]),
        ("layers_to_transform", [True]),
        ("layers_to_transform", -1),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(option, value):
    problems = refused(config(**{option: value}))
    assert [p for p in problems if p.startswith(f"adapter_config.json: {option} = ")]


def test_every_option_of_this_peft_is_known_or_refused_when_it_is_set():
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields >= HONOURED
    for name in fields - HARMLESS - HONOURED:
        assert f"adapter_config.json: {name} = " in refused(config(**{name: {"x": 1}}))[0]


def test_an_option_at_its_off_value_is_no_objection():
    off = {"of_2031": None, "of_2032": False, "of_2033": [], "of_2034": {}, "of_2035": ""}
    assert converted(config(**off), layered(Q))


def test_old_configs_without_the_newer_options_convert():
    old = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]}
    assert converted(old, layered(Q)).config.uniform.scale == 4


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", "ADALORA", "LOHA", "VERA"])
def test_other_peft_methods_are_refused_by_their_name(kind, tmp_path):
    peft = pytest.importorskip("peft")
    options = {
        "PREFIX_TUNING": {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"},
        "ADALORA": {"total_step": 10},
    }
    classes = {"PREFIX_TUNING": "PrefixTuning", "ADALORA": "AdaLora", "LOHA": "LoHa"}
    name = classes.get(kind, kind.title() if kind == "VERA" else kind)
    getattr(peft, f"{name}Config")(**options.get(kind, {})).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (problem,) = refused(saved)
    assert problem == f"adapter_config.json is of type '{kind}'; only LORA adapters convert"


@pytest.mark.parametrize("content", [None, [], "LORA", 3])
def test_a_config_that_is_no_object_is_refused(content):
    assert refused(content) == ["adapter_config.json does not hold an object"]


def test_mlx_lms_own_config_is_told_apart():
    (problem,) = refused({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {}})
    assert "has no peft_type: it is not PEFT's" in problem


def test_a_pattern_and_layers_do_not_go_together_as_in_peft():
    options = config(target_modules=".*q_proj", layers_to_transform=[0])
    (problem,) = refused(options)
    assert "layers_to_transform does not go with target_modules as one pattern" in problem
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a str"):
        pytest.importorskip("peft").LoraConfig(target_modules=".*q", layers_to_transform=[0])


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


# ---- tensors ----


def test_a_raw_state_dict_with_the_adapters_name_converts_the_same():
    weights = layered(Q)
    raw = {name.replace(".weight", ".default.weight"): array for name, array in weights.items()}
    plain, named = converted(config(), weights), converted(config(), raw)
    assert plain.config == named.config
    assert all(mx.array_equal(plain.weights[n], named.weights[n]) for n in plain.weights)


def test_a_module_that_is_called_default_keeps_its_name():
    lora = converted(config(), tensors("model.default.q_proj"))
    assert set(lora.weights) == {"model.default.q_proj.lora_a", "model.default.q_proj.lora_b"}


def test_two_names_for_one_tensor_are_refused():
    weights = layered(Q)
    again = {n.replace(".weight", ".default.weight"): a for n, a in weights.items() if "_A" in n}
    problems = refused(config(), weights | again)
    assert len(problems) == 2
    assert all("is there under two names" in p for p in problems)


def test_tensors_are_transposed_and_keep_their_bits():
    made = make(layers=1, head=False)
    arrays = {name: mx.array(array) for name, array in made.adapter.items()}
    lora = converted(made.config, arrays)
    for name, array in made.adapter.items():
        module, part = name.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
        found = np.array(lora.weights[f"{module}.{part.lower()}"])
        assert found.tobytes() == array.T.tobytes()


def test_the_copy_of_the_heads_weight_is_dropped_when_its_shape_is_right():
    head = tensors("lm_head", inner=8, out=30)
    copy = {f"{PREFIX}lm_head.base_layer.weight": mx.zeros((30, 8))}
    bias = {f"{PREFIX}lm_head.base_layer.bias": mx.zeros((30,))}
    options = config(target_modules=["q_proj", "lm_head"])
    lora = converted(options, layered(Q) | head | copy | bias)
    assert set(lora.head_weights) == {"lora_a", "lora_b"}
    assert not [name for name in lora.weights if "head" in name]


@pytest.mark.parametrize("shape", [(8, 30), (31, 8), (30, 8, 1), (30,), ()])
def test_a_copy_of_the_heads_weight_with_a_wrong_shape_is_refused_with_both(shape):
    weights = layered(Q) | tensors("lm_head", inner=8, out=30)
    weights[f"{PREFIX}lm_head.base_layer.weight"] = mx.zeros(shape)
    (problem,) = refused(config(target_modules=["q_proj", "lm_head"]), weights)
    assert f"has shape {shape}, its LoRA expects (30, 8)" in problem


def test_a_copy_without_a_lora_beside_it_is_refused():
    weights = layered(Q) | {f"{PREFIX}lm_head.base_layer.weight": mx.zeros((30, 8))}
    (problem,) = refused(config(), weights)
    assert problem == f"tensor {PREFIX}lm_head.base_layer.weight (30, 8) is not part of a LoRA"


def test_half_a_pair_is_refused():
    weights = layered(Q)
    del weights[f"{PREFIX}model.layers.1.{Q}.lora_B.weight"]
    assert refused(config(), weights) == [f"model.layers.1.{Q}: lora_B is missing"]


def test_a_rank_that_is_not_the_configs_is_refused_with_both():
    assert refused(config(r=8)) == [
        f"model.layers.{i}.{Q}: the tensors have rank 4, the config says 8" for i in (0, 1)
    ]


def test_two_ranks_in_one_pair_are_refused_with_both_shapes():
    weights = layered(Q, layers=(0,))
    weights[f"{PREFIX}model.layers.0.{Q}.lora_B.weight"] = mx.zeros((6, 5))
    (problem,) = refused(config(), weights)
    assert "lora_A (4, 8) and lora_B (6, 5) do not fit together" in problem


@pytest.mark.parametrize("shape", [(), (4,), (4, 8, 1), (0, 8), (4, 0)])
def test_a_tensor_that_is_no_matrix_is_refused_with_its_shape(shape):
    weights = layered(Q, layers=(0,))
    weights[f"{PREFIX}model.layers.0.{Q}.lora_A.weight"] = mx.zeros(shape)
    assert f"has shape {shape}, expected (r, in) or (out, r)" in refused(config(), weights)[0]


def test_an_adapter_without_tensors_is_refused():
    assert refused(config(), {}) == [
        "the adapter holds no LoRA tensors",
        "target_modules names 'q_proj', but no tensor belongs to it (if the base has no such "
        "module, remove it from adapter_config.json)",
    ]


def test_everything_wrong_with_one_adapter_is_listed_at_once():
    weights = layered(Q, layers=(0, 1, 2))
    del weights[f"{PREFIX}model.layers.0.{Q}.lora_A.weight"]
    weights[f"{PREFIX}model.layers.1.{Q}.lora_B.weight"] = mx.zeros((6, 5))
    weights |= tensors("model.layers.0.mlp.up_proj")
    weights["stray"] = mx.zeros((1,))
    problems = refused(config(rank_pattern={r"layers\.2\..*": 9}), weights)
    assert len(problems) == 5
    problems = refused(config(use_dora=True, bias="all", r=0, target_modules=3, of_2031="x"))
    assert len(problems) == 5


# ---- which of the two forms ----


def test_the_same_lora_in_every_layer_takes_mlx_lms_form():
    lora = converted(config(target_modules=["q_proj", "v_proj"]), layered(Q, V))
    assert lora.config.num_layers == 2
    assert set(lora.config.keys) == {Q, V}
    assert lora.config.uniform.rank == 4
    assert lora.config.uniform.scale == 4.0
    assert not lora.config.modules


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r"model\.layers\.[01]\.self_attn\.q_proj"},
        {"target_modules": ["0.self_attn.q_proj", "1.self_attn.q_proj"]},
        {"layers_to_transform": [0, 1]},
        {"exclude_modules": r".*\.2\..*"},
    ],
    ids=str,
)
def test_first_layers_alone_are_never_written_as_last_layers(options):
    """mlx-lm counts layers from the last: with a third layer it would adapt the wrong two."""
    by_module = converted(config(**options), layered(Q)).config
    assert by_module.uniform is None
    assert set(by_module.modules) == {f"model.layers.{i}.{Q}" for i in (0, 1)}
    assert converted(config(**options), layered(Q), num_layers=3).config.uniform is None
    assert converted(config(**options), layered(Q), num_layers=2).config.num_layers == 2
    assert converted(config(**options), layered(Q), num_layers=2).config.uniform is not None


def test_different_ranks_or_gaps_are_written_module_by_module():
    weights = layered(Q, layers=(0,)) | layered(Q, layers=(1,), rank=2)
    lora = converted(config(rank_pattern={"layers.1.self_attn.q_proj": 2}), weights)
    assert {name: spec.rank for name, spec in lora.config.modules.items()} == {
        f"model.layers.0.{Q}": 4,
        f"model.layers.1.{Q}": 2,
    }
    assert math.isclose(lora.config.modules[f"model.layers.1.{Q}"].scale, 8.0)
    gap = converted(config(), layered(Q, layers=(0, 2)))
    assert gap.config.num_layers == 3
    assert len(gap.config.modules) == 2


def test_two_stacks_of_layers_are_not_mistaken_for_one():
    weights = layered(Q, layers=(0, 1)) | tensors(f"vision.layers.0.{Q}", f"vision.layers.1.{Q}")
    assert len(converted(config(), weights).config.modules) == 4


@pytest.mark.parametrize("number", ["007", "٣", "1234567", "²"])
def test_a_segment_that_is_no_layer_number_is_part_of_the_path(number):
    lora = converted(config(), tensors(f"model.layers.{number}.q_proj"))
    assert set(lora.weights) == {f"model.layers.{number}.q_proj.lora_{part}" for part in ("a", "b")}


def test_a_huge_layer_number_costs_nothing():
    start = time.perf_counter()
    weights = tensors(*(f"model.layers.999999.a{i}.q_proj" for i in range(500)))
    assert converted(config(), weights).config.num_layers == 1_000_000
    assert time.perf_counter() - start < 2


def test_the_head_is_kept_apart_unless_the_base_is_known_to_have_one():
    weights = layered(Q) | tensors("lm_head")
    options = config(target_modules=["q_proj", "lm_head"])
    apart = converted(options, weights)
    assert apart.head.scale == 4.0
    assert apart.config.keys == (Q,)
    within = converted(options, weights, head_is_a_layer=True, num_layers=2)
    assert within.head is None
    assert set(within.config.keys) == {Q, "lm_head"}
    assert "lm_head.lora_a" in within.weights


def test_a_head_alone_in_the_layers_does_not_read_as_all_layers():
    options = config(target_modules=["lm_head"])
    lora = converted(options, tensors("lm_head"), head_is_a_layer=True, num_layers=2)
    assert (lora.config.num_layers, lora.config.keys) == (1, ("lm_head",))
    assert converted(options, tensors("lm_head")).config.num_layers == 0
