"""Converted checkpoints, fused: PEFT's own merged weights, and what PyTorch says.

Tolerances: float32 on both sides, so what remains is the order of summation: 1e-6 for weights
(seen: 1.2e-7) and 1e-4 for log-probabilities, as for the unfused model (``test_parity.py``).
"""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from kmerge_mlx import compress, load
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from tests.reference.torch_reference import load_reference
from tests.tools.models import fuse_folders

pytestmark = pytest.mark.slow

NAMES = (
    *("tied_k2_as_the_reference_trains", "untied_k3_with_lm_head"),
    *("tied_k4_rslora_with_rank_and_alpha_patterns", "untied_k5_llama_lm_head_pattern"),
)


@pytest.fixture(scope="module", params=["upstream", *NAMES])
def case(request, tmp_path_factory, live_checkpoint):
    """A checkpoint of the authors' layout, and the folder that it was fused into."""
    source, home = live_checkpoint(request.param), tmp_path_factory.mktemp("fused")
    convert_checkpoint(str(source / "checkpoint"), home / "adapter", str(source / "base"))
    fuse_folders(source / "base", home / "adapter", home / "fused")
    return source, home / "fused"


def test_fused_weights_are_those_that_peft_merges(case):
    source, fused = case
    peft = load_reference(source / "base", source / "checkpoint").model
    tied = peft.config.tie_word_embeddings
    merged = {name: t.detach().numpy() for name, t in peft.merge_and_unload().state_dict().items()}
    ours = mx.load(str(fused / "model.safetensors"))
    if tied:  # PEFT writes the head's LoRA into the table as well, which moves the input
        del merged["model.embed_tokens.weight"]
        table = mx.load(str(source / "base" / "model.safetensors"))["model.embed_tokens.weight"]
        assert mx.array_equal(ours.pop("model.embed_tokens.weight"), table)
    assert ours.keys() == merged.keys()
    for name, wanted in merged.items():
        np.testing.assert_allclose(np.array(ours[name]), wanted, rtol=0, atol=1e-6, err_msg=name)


def test_every_decoded_step_of_a_fused_model_is_the_reference(case):
    source, fused = case
    model, tokenizer = load(str(fused), fused)
    expected = json.loads((source / "expected.json").read_text())
    tensors = mx.load(str(source / "expected.safetensors"))
    for i, prompt in enumerate(expected["cases"]):
        reference = tensors.get(f"{i}.steps", tensors[f"{i}.logits"][None])
        reference = reference - mx.logsumexp(reference, axis=-1, keepdims=True)
        ids = compress(model, tokenizer, prompt["prompt"]).ids
        steps = generate_step(mx.array(ids), model, max_tokens=reference.shape[0])
        for (token, logprobs), wanted, greedy in zip(
            steps, reference, prompt["greedy"], strict=False
        ):
            assert token == greedy
            assert mx.abs(logprobs - wanted).max().item() < 1e-4
