"""The tensors of a PEFT adapter, and the form of LoRA config they are written in.

Hand-made tensors: pairs that fit are transposed bit for bit, anything else is refused by name. The
same LoRA in every layer takes mlx-lm's form, any other is written module by module.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.convert.peft import PREFIX
from tests.checkpoints import make
from tests.peft_adapters import Q, V, config, converted, layered, refused, tensors

# ---- tensors ----


def test_a_raw_state_dict_with_the_adapters_name_converts_the_same():
    weights = layered(Q)
    raw = {name.replace(".weight", ".default.weight"): array for name, array in weights.items()}
    plain, named = converted(config(), weights), converted(config(), raw)
    assert plain.tuning == named.tuning
    assert all(
        mx.array_equal(plain.tuning_weights[n], named.tuning_weights[n])
        for n in plain.tuning_weights
    )


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
        found = np.array(lora.tuning_weights[f"{module}.{part.lower()}"])
        assert found.tobytes() == array.T.tobytes()


def test_the_copy_of_the_heads_weight_is_dropped():
    weights = layered(Q) | tensors("lm_head", inner=8, out=30)
    weights[f"{PREFIX}lm_head.base_layer.weight"] = mx.zeros((30, 8))
    weights[f"{PREFIX}lm_head.base_layer.bias"] = mx.zeros((30,))
    lora = converted(config(target_modules=["q_proj", "lm_head"]), weights)
    assert set(lora.head_weights) == {"lora_a", "lora_b"}
    assert not [name for name in lora.tuning_weights if "head" in name]


def test_half_a_pair_is_refused():
    weights = layered(Q)
    del weights[f"{PREFIX}model.layers.1.{Q}.lora_B.weight"]
    assert refused(config(), weights) == [f"model.layers.1.{Q}.lora_B.weight is missing"]


def test_a_rank_that_is_not_the_configs_is_refused_with_both():
    assert refused(config(r=8)) == [
        f"model.layers.{i}.{Q}: the tensors have rank 4, the config says 8" for i in (0, 1)
    ]


def test_two_ranks_in_one_pair_are_refused_with_both_shapes():
    weights = layered(Q, layers=(0,))
    weights[f"{PREFIX}model.layers.0.{Q}.lora_B.weight"] = mx.zeros((6, 5))
    (problem,) = refused(config(), weights)
    assert "lora_A (4, 8) and lora_B (6, 5) do not fit together" in problem


@pytest.mark.parametrize("shape", [(), (4, 8, 1), (0, 8)])
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
    assert lora.tuning.num_layers == 2
    assert set(lora.tuning.keys) == {Q, V}
    assert lora.tuning.uniform.rank == 4
    assert lora.tuning.uniform.scale == 4.0
    assert not lora.tuning.modules


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
    by_module = converted(config(**options), layered(Q)).tuning
    assert by_module.uniform is None
    assert set(by_module.modules) == {f"model.layers.{i}.{Q}" for i in (0, 1)}
    assert converted(config(**options), layered(Q), num_layers=3).tuning.uniform is None
    assert converted(config(**options), layered(Q), num_layers=2).tuning.num_layers == 2
    assert converted(config(**options), layered(Q), num_layers=2).tuning.uniform is not None


def test_different_ranks_or_gaps_are_written_module_by_module():
    weights = layered(Q, layers=(0,)) | layered(Q, layers=(1,), rank=2)
    lora = converted(config(rank_pattern={"layers.1.self_attn.q_proj": 2}), weights)
    assert {name: spec.rank for name, spec in lora.tuning.modules.items()} == {
        f"model.layers.0.{Q}": 4,
        f"model.layers.1.{Q}": 2,
    }
    assert math.isclose(lora.tuning.modules[f"model.layers.1.{Q}"].scale, 8.0)
    gap = converted(config(), layered(Q, layers=(0, 2)))
    assert gap.tuning.num_layers == 3
    assert len(gap.tuning.modules) == 2


def test_two_stacks_of_layers_are_not_mistaken_for_one():
    weights = layered(Q, layers=(0, 1)) | tensors(f"vision.layers.0.{Q}", f"vision.layers.1.{Q}")
    assert len(converted(config(), weights).tuning.modules) == 4


@pytest.mark.parametrize("number", ["007", "٣", "1234567", "²"])
def test_a_segment_that_is_no_layer_number_is_part_of_the_path(number):
    lora = converted(config(), tensors(f"model.layers.{number}.q_proj"))
    assert set(lora.tuning_weights) == {
        f"model.layers.{number}.q_proj.lora_{part}" for part in ("a", "b")
    }


def test_a_huge_layer_number_is_a_layer_number():
    weights = tensors("model.layers.999999.q_proj")
    assert converted(config(), weights).tuning.num_layers == 1_000_000


def test_the_head_is_kept_apart_unless_the_base_is_known_to_have_one():
    weights = layered(Q) | tensors("lm_head")
    options = config(target_modules=["q_proj", "lm_head"])
    apart = converted(options, weights)
    assert apart.merge.head_lora.scale == 4.0
    assert apart.tuning.keys == (Q,)
    within = converted(options, weights, head_is_a_layer=True, num_layers=2)
    assert within.merge.head_lora is None
    assert set(within.tuning.keys) == {Q, "lm_head"}
    assert "lm_head.lora_a" in within.tuning_weights


def test_a_head_alone_does_not_read_as_all_layers():
    options = config(target_modules=["lm_head"])
    lora = converted(options, tensors("lm_head"), head_is_a_layer=True, num_layers=2)
    assert (lora.tuning.num_layers, lora.tuning.keys) == (1, ("lm_head",))
