"""Penalties and other logits processors see the original token ids, and cost no wait.

Oracle: mlx-lm's processors called by hand with the original ids and the answer so far.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from kmerge_mlx import batch_generate, compress, stream_generate
from kmerge_mlx.generation.stream import over_original_ids
from tests.tiny import VOCAB_SIZE as V
from tests.tiny import prompts_of

PENALTIES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5, "repetition_context_size": 3},
    {"presence_penalty": 2.0, "presence_context_size": 64},
    {"frequency_penalty": 1.5, "frequency_context_size": 200},
    {"logit_bias": {5: 3.0, 699: -2.0}},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
]


@pytest.mark.parametrize("options", PENALTIES, ids=lambda o: "+".join(o))
def test_penalties_are_mlx_lms_over_the_original_ids_also_in_a_batch(tiny, options):
    model, tokenizer = tiny

    def penalties():
        return make_logits_processors(**options)

    prompts = [*prompts_of(3, 3, 70, seed=9), *prompts_of(1, 61, 61, seed=6)]
    together = batch_generate(
        *tiny, prompts, max_tokens=8, logits_processors=penalties(), return_token_ids=True
    )
    for ids, batched in zip(prompts, together.token_ids, strict=True):
        prompt = compress(model, tokenizer, ids)
        found = stream_generate(*tiny, prompt, max_tokens=8, logits_processors=penalties())
        cache, read, answer = make_prompt_cache(model), prompt.ids, []
        for response in found:
            logits = model(mx.array([read]), cache=cache)[:, -1, :]
            for processor in penalties():
                logits = processor(mx.array(ids + answer), logits)
            wanted = (logits - mx.logsumexp(logits, keepdims=True))[0]
            assert mx.abs(response.logprobs - wanted).max().item() < 1e-5
            answer.append(response.token)
            read = [response.token]
        assert batched == [token for token in answer if token not in tokenizer.eos_token_ids]


def test_a_guarded_processor_reads_nothing_back_from_the_device(tiny, monkeypatch):
    """The decode loop must not wait: the guard only builds arrays."""
    prompt = compress(*tiny, [1, 2, 3, 4, 5])
    (guarded,) = over_original_ids([lambda tokens, logits: logits], prompt)
    for name in ("eval", "async_eval", "synchronize"):
        monkeypatch.setattr(mx, name, lambda *_: pytest.fail("the guard waited for the device"))
    guarded(mx.array([*prompt.ids, 3]), mx.zeros((1, V)))
