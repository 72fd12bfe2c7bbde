"""The tensors of a PEFT adapter, and the form of LoRA config they are written in.

Hand-made tensors: pairs that fit are transposed bit for bit, anything else is refused by name. The
same LoRA in every layer takes mlx-lm's form, any other is written module by module.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from kmerge_mlx.adapters.schema import LoRAConfig, LoRASpec
from kmerge_mlx.convert.peft import PREFIX
from tests.peft_adapters import Q, V, config, converted, layered, refused, tensors


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
    assert refused(config(), {}) == [
        "the adapter holds no LoRA tensors",
        "target_modules names 'q_proj', but no tensor belongs to it (if the base has no such "
        "module, remove it from adapter_config.json)",
    ]


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
