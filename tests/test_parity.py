"""Our numbers against PyTorch + PEFT: the authors' own checkpoint, and ten made live.

Tolerances: float32 on both sides, so what remains is the order of summation. Merged embeddings
agree within 1e-5 and log-probabilities within 1e-4 (what was seen: under 2e-6 and 5e-6).
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from kmerge_mlx import batch_generate, compress, load
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.model import merged_embedding
from tests.reference.make_checkpoints import SPECS


@pytest.fixture(
    scope="module",
    params=["upstream", *(pytest.param(name, marks=pytest.mark.slow) for name in SPECS)],
)
def case(request, tmp_path_factory, live_checkpoint):
    """A checkpoint folder with its expected outputs, converted and loaded."""
    folder = live_checkpoint(request.param)
    expected = json.loads((folder / "expected.json").read_text())
    adapter = tmp_path_factory.mktemp("adapter") / request.param
    convert_checkpoint(str(folder / "checkpoint"), adapter, str(folder / "base"), expected["k"])
    model, tokenizer = load(str(folder / "base"), adapter, expected["k"])
    tensors = mx.load(str(folder / "expected.safetensors"))
    return SimpleNamespace(model=model, tokenizer=tokenizer, tensors=tensors, **expected)


def test_prompts_become_the_reference_token_ids_and_padding(case):
    for expected in case.cases:
        prompt = compress(case.model, case.tokenizer, expected["prompt"])
        assert prompt.original_ids == expected["ids"]
        assert len(prompt.ids) == -(-len(expected["ids"]) // case.k)
    assert merged_embedding(case.model).pad_token_id == case.pad_token_id


def test_merged_embeddings_are_the_reference_within_1e_5(case):
    embedding = merged_embedding(case.model)
    for i, expected in enumerate(case.cases):
        prompt = compress(case.model, case.tokenizer, expected["prompt"])
        gap = mx.abs(embedding(mx.array(prompt.ids)) - case.tensors[f"{i}.merged"]).max().item()
        assert gap < 1e-5


def test_greedy_tokens_and_every_step_are_the_reference_within_1e_4(case):
    for i, expected in enumerate(case.cases):
        prompt = compress(case.model, case.tokenizer, expected["prompt"])
        # The authors' fixture holds the logits of the first step, the live ones those of all.
        reference = case.tensors.get(f"{i}.steps", case.tensors[f"{i}.logits"][None])
        reference = reference - mx.logsumexp(reference, axis=-1, keepdims=True)
        count = max(16, reference.shape[0])
        steps = list(generate_step(mx.array(prompt.ids), case.model, max_tokens=count))
        assert [token for token, _ in steps] == expected["greedy"][:count]
        for (_, logprobs), wanted in zip(steps, reference, strict=False):
            assert mx.abs(logprobs - wanted).max().item() < 1e-4


def test_batched_prompts_give_the_reference_tokens(case):
    eos = case.tokenizer.eos_token_ids
    found = batch_generate(
        case.model,
        case.tokenizer,
        [expected["prompt"] for expected in case.cases],
        max_tokens=16,
        return_token_ids=True,
    ).token_ids
    for tokens, expected in zip(found, case.cases, strict=True):
        greedy = expected["greedy"][:16]
        stop = next((i for i, token in enumerate(greedy) if token in eos), len(greedy))
        assert tokens == greedy[:stop]
