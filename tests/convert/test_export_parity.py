"""Exported adapters in PyTorch + PEFT: they load strictly, and the logits are ours.

The adapters are checkpoints that PyTorch trained and ``convert`` brought here, and one trained
here. Tolerance: float32 on both sides, so what remains is the order of summation; log-probabilities
agree within 1e-4 (what was seen: under 5e-6). PyTorch's logits after the round trip are those
before it within 1e-5: two runs may sum in another order.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from kmerge_mlx import compress, load
from kmerge_mlx.adapters.folder import load_adapter
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter
from kmerge_mlx.convert.torch_read import read_state_dict
from kmerge_mlx.errors import KMergeError
from kmerge_mlx.files import read_safetensors
from tests.conversions import assert_same_tensors, bits
from tests.reference.torch_reference import Reference, decode, load_reference
from tests.train_runs import BASE, SMALL_TREES, trained

pytestmark = pytest.mark.slow
STEPS = 4
LIVE = (
    *("tied_k2_as_the_reference_trains", "untied_k3_with_lm_head", "tied_k3_lm_head_only"),
    *("tied_k4_rslora_with_rank_and_alpha_patterns", "untied_k4_attention_of_layers_0_and_2"),
    "untied_k5_llama_lm_head_pattern",
)


@dataclass
class Case:
    """A checkpoint that PyTorch saved, its adapter, and what that was exported to."""

    checkpoint: Path
    base: Path
    adapter: Path
    exported: Path
    prompts: list[str]  # of several lengths
    steps: list[np.ndarray]  # PyTorch's logits for each prompt, before the round trip


@pytest.fixture(scope="module", params=LIVE)
def case(request, tmp_path_factory, live_checkpoint) -> Case:
    source, home = live_checkpoint(request.param), tmp_path_factory.mktemp(request.param)
    convert_checkpoint(str(source / "checkpoint"), home / "x", str(source / "base"))
    export_adapter(home / "x", home / "y")
    cases = json.loads((source / "expected.json").read_text())["cases"]
    tensors = mx.load(str(source / "expected.safetensors"))
    steps = [np.array(tensors[f"{i}.steps"][:STEPS]) for i in range(len(cases))]
    prompts = [expected["prompt"] for expected in cases]
    return Case(source / "checkpoint", source / "base", home / "x", home / "y", prompts, steps)


def strictly_loaded(base: Path, exported: Path) -> Reference:
    """The adapter under PyTorch + PEFT: no tensor of it missing, and none too many."""
    with warnings.catch_warnings():
        # PEFT says here what it misses; of the tied base it says what it always says.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        reference = load_reference(base, exported)
    result = reference.model.load_adapter(str(exported), "again")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    carried = {n for n, _ in reference.model.named_parameters() if "lora_" in n and "default" in n}
    stored = read_safetensors(exported / "adapter_model.safetensors", KMergeError)
    assert {name.replace(".default", "") for name in carried} == set(stored)
    return reference


def gap(reference: Reference, base: Path, adapter: Path, prompts: list[str]) -> float:
    """The largest difference of log-probabilities, ours to PyTorch's, over the first steps."""
    model, tokenizer = load(str(base), adapter)
    largest = 0.0
    for text in prompts:
        prompt = compress(model, tokenizer, text)
        ours = list(generate_step(mx.array(prompt.ids), model, max_tokens=STEPS))
        tokens, logits = decode(reference.model, reference.merge(prompt.original_ids), STEPS)
        theirs = mx.array(logits.numpy())
        theirs = theirs - mx.logsumexp(theirs, axis=-1, keepdims=True)
        assert [token for token, _ in ours] == tokens
        gaps = [mx.abs(mine - their) for (_, mine), their in zip(ours, theirs, strict=True)]
        largest = max(largest, mx.stack(gaps).max().item())
    return largest


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_it_strictly_and_the_logits_are_ours_within_1e_4(case):
    reference = strictly_loaded(case.base, case.exported)
    assert gap(reference, case.base, case.adapter, case.prompts) < 1e-4
    for prompt, expected in zip(case.prompts, case.steps, strict=True):
        _, found = decode(reference.model, reference.merge(reference.ids(prompt)), STEPS)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_both_round_trips_keep_every_bit_with_and_without_the_base(case, tmp_path):
    one, two = (
        read_safetensors(folder / "adapter_model.safetensors", KMergeError)
        for folder in (case.checkpoint, case.exported)
    )
    assert bits({n: a for n, a in one.items() if "base_layer" not in n}) == bits(two)
    states = (read_state_dict(f / "encoder.pth") for f in (case.checkpoint, case.exported))
    assert bits(next(states)) == bits(next(states))
    made = load_adapter(case.adapter)
    for model in (None, str(case.base)):
        convert_checkpoint(str(case.exported), tmp_path / "back", model, force=True)
        found = load_adapter(tmp_path / "back")
        assert_same_tensors(found, made)
        assert found.tuning == made.tuning
        assert found.merge == made.merge


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("k", [2, 4])
def test_an_adapter_trained_here_goes_to_pytorch_and_back(tmp_path, k):
    path = tmp_path / "x"
    yaml = "lora_parameters: {rank: 6, scale: 11.3, dropout: 0}\n"
    trained(path, *SMALL_TREES, "--k", k, "--iters", 8, "--num-layers", 1, yaml=yaml)
    export_adapter(path, tmp_path / "y")
    reference = strictly_loaded(BASE, tmp_path / "y")
    tree = "Tree: AB\n+CD, Task: Parent/Child Relationship, Parent: AB, Child: CD, Answer: "
    assert gap(reference, BASE, path, [tree, "A", "é, 12345"]) < 1e-4
    merged = reference.merge(reference.ids(tree))
    _, with_lora = decode(reference.model, merged, 1)
    with reference.model.disable_adapter():
        _, without = decode(reference.model, merged, 1)
    assert (with_lora - without).abs().max() > 1e-2  # a LoRA that is left out would be seen
    convert_checkpoint(str(tmp_path / "y"), tmp_path / "back")
    made, found = load_adapter(path), load_adapter(tmp_path / "back")
    assert_same_tensors(found, made)
    assert sorted(found.tuning.keys) == sorted(made.tuning.keys)
    assert replace(found.tuning, keys=()) == replace(made.tuning, keys=())
    assert replace(found.merge, provenance={}) == replace(made.merge, provenance={})
