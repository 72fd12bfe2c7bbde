"""LoRA as a model that only answers carries it: the same numbers in fewer kernels."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from kmerge_mlx.adapters.folder import load_adapter, save_adapter
from kmerge_mlx.adapters.lora import FoldedLinear
from kmerge_mlx.adapters.schema import LoRAConfig, LoRASpec
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.model import adapter_of, load_source, merged_embedding, unfreeze
from kmerge_mlx.source import Source
from kmerge_mlx.tools.bench import load_sides
from tests.tiny import PROJECTIONS, build, qwen2_config, random_adapter, write_base

IDS = mx.array([[5, 6, 7, 8, 9], [700, 701, 2, 3, 4]])
SPEC = LoRASpec(4, 0.7)
MODULES = 2 * len(PROJECTIONS)  # of two layers
CONFIGS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "packed": {"quantization": {"group_size": 32, "bits": 4}},
    "packed and untied": {
        "quantization": {"group_size": 32, "bits": 8},
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(params=CONFIGS)
def source(tmp_path, request) -> Source:
    """A base, and a float32 LoRA on its projections and its head."""
    changes = CONFIGS[request.param]
    base = write_base(tmp_path / "base", qwen2_config(**changes))
    adapter = random_adapter(build(qwen2_config(**changes)), 4)
    merge = replace(adapter.merge, head_lora=SPEC)
    tuning = LoRAConfig(2, 0.0, SPEC, PROJECTIONS)
    save_adapter(replace(adapter, merge=merge, tuning=tuning), tmp_path / "adapter")
    return Source.find(str(base), tmp_path / "adapter")


def cast(source: Source, dtype: mx.Dtype) -> None:
    """Makes the base's weights of a dtype; the adapter stays float32."""
    path = source.path / "model.safetensors"
    weights = {
        name: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in mx.load(str(path)).items()
    }
    mx.save_safetensors(str(path), weights)


def both(source: Source) -> tuple[nn.Module, nn.Module]:
    """The model with mlx-lm's own LoRA layers, and as it is loaded to answer."""
    models = load_source(source, fold=False)[0], load_source(source)[0]
    rows = mx.random.normal((2, 64), key=mx.random.key(1))
    for model in models:
        merged = merged_embedding(model)
        merged._rows = rows.astype(merged.dtype)
    return models


def operations(model: nn.Module, path: Path) -> Counter[str]:
    """How often each operation is in one forward pass; ``path`` is a file to use."""
    mx.export_to_dot(str(path), model(IDS))
    return Counter(re.findall(r'label ="(\w+)", shape=rectangle', path.read_text()))


@pytest.mark.parametrize(("dtype", "most"), [(mx.float32, 1e-6), (mx.bfloat16, 0.03)])
def test_folded_lora_says_what_mlx_lms_layers_say(source, dtype, most):
    cast(source, dtype)
    stored, folded = (np.array(m(IDS).astype(mx.float32)) for m in both(source))
    assert np.abs(folded - stored).max() < most * np.abs(stored).max()
    if dtype == mx.float32:
        assert np.abs(folded - stored).max() < 1e-5
    plain = load_source(replace(source, adapter_path=None, adapter=None, merge=None))[0]
    assert np.abs(np.array(plain(IDS % 700)[0].astype(mx.float32)) - stored[0]).max() > 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_module_takes_two_kernels_beside_its_own(source, dtype, tmp_path):
    cast(source, dtype)
    before, after = (operations(m, tmp_path / "graph.dot") for m in both(source))
    untied = merged_embedding(load_source(source)[0]).get("lora_a") is None
    modules = MODULES + untied  # a tied head's second product was an AddMM before
    assert after["AddMM"] - before["AddMM"] == before["Matmul"] - after["Matmul"] == modules
    assert before["Multiply"] - after["Multiply"] == MODULES + 1
    assert before["Add"] - after["Add"] == modules
    if dtype == mx.bfloat16:
        assert before["AsType"] - after["AsType"] >= 2 * (MODULES + 1)


def test_what_is_saved_trained_or_fused_has_the_stored_factors(source):
    model, *_ = load_source(source, fold=False)
    stored = load_adapter(source.adapter)
    found = adapter_of(model, stored.merge, stored.tuning).tuning_weights
    assert found.keys() == stored.tuning_weights.keys()
    assert all(mx.array_equal(found[n], a) for n, a in stored.tuning_weights.items())
    unfreeze(model, stored.tuning)
    assert {type(m) for m in model.modules() if "lora_a" in m} >= {LoRALinear}
    folded, *_ = load_source(source)
    for forbidden in (
        lambda: adapter_of(folded, stored.merge, stored.tuning),
        lambda: unfreeze(folded, stored.tuning),
    ):
        with pytest.raises(AdapterError, match="folded for inference: load it without `fold`"):
            forbidden()


def test_folded_factors_have_the_bases_dtype(source):
    cast(source, mx.bfloat16)
    for model in (load_source(source)[0], load_sides(source, {4: source}, (8,), 0)[2].llm):
        factors = [a for n, a in tree_flatten(model.parameters()) if "lora_" in n]
        assert len(factors) == 2 * (MODULES + 1)
        assert {a.dtype for a in factors} == {mx.bfloat16}
        layers = [m for m in model.modules() if isinstance(m, FoldedLinear | LoRALinear)]
        assert {type(m) for m in layers} == {FoldedLinear}
