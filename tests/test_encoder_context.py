"""An encoder that reads tokens before its block: the same prompts read in many ways.

Oracle: the merged embeddings of a plain loop over the tokens, read by mlx-lm as embeddings.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.tokenizer_utils import load as load_tokenizer

from kmerge_mlx import Segment, compress
from kmerge_mlx.model import attach, merged_embedding
from tests.conftest import UPSTREAM
from tests.tiny import PAD, build, prompts_of, qwen2_config, random_adapter, steps

K, C = 4, 3


@pytest.fixture(scope="module")
def near():
    """A random K = 4 model whose encoder reads three tokens before each block."""
    model = build(qwen2_config())
    attach(model, random_adapter(model, K, context=C), PAD)
    model.context_length = 32_768
    return model, load_tokenizer(UPSTREAM / "base")


def naive_rows(model, segments: list[Segment]) -> mx.array:
    """What the model should read of a prompt ``(N, D)``, one block after the other."""
    merged, rows = merged_embedding(model), []
    for segment in segments:
        ids = list(segment.ids)
        if not segment.merge:
            rows.extend(merged.embedding(mx.array(ids)))
            continue
        for start in range(0, len(ids), K):
            places = range(start - C, start + K)
            read = [ids[i] if 0 <= i < len(ids) else PAD for i in places]
            table = merged.embedding(mx.array(read))
            hidden = table.reshape(-1)
            for name in ("w1", "w2", "w3"):
                layer = merged.encoder[name]
                hidden = layer.weight @ hidden + layer.bias
                hidden = mx.maximum(hidden, 0) if name != "w3" else hidden
            rows.append(table[C:].mean(axis=0) + hidden)
    return mx.stack(rows)


def assert_same(found, wanted, tolerance=1e-4):
    for (token, logprobs), (wanted_token, wanted_logprobs) in zip(found, wanted, strict=True):
        assert token == wanted_token
        assert mx.abs(logprobs - wanted_logprobs).max().item() < tolerance


@pytest.mark.parametrize("length", [1, 4, 5, 101])
def test_generation_reads_what_a_plain_loop_over_the_tokens_gives(near, length):
    model, tokenizer = near
    ids = prompts_of(1, length, length, seed=length)[0]
    segments = [Segment([7, 8], False), Segment(ids), Segment([9], False), Segment(ids[:6])]
    prompt = compress(model, tokenizer, segments)
    rows = naive_rows(model, segments)
    assert mx.abs(merged_embedding(model)(mx.array(prompt.ids)) - rows).max().item() < 1e-5
    wanted = generate_step(mx.array([], mx.int32), model, max_tokens=6, input_embeddings=rows)
    assert_same(steps(model, prompt, 6), list(wanted))


def test_a_cached_prefix_gives_the_logprobs_of_no_cache(near):
    """A longer text shares whole blocks only: its next block is another, context included."""
    model, _ = near
    merged, store = merged_embedding(model), LRUPromptCache()
    shared = prompts_of(1, 80, 80, seed=8)[0]
    first = merged.compress([Segment(shared)])
    cache = make_prompt_cache(model)
    model(mx.array([first.ids]), cache=cache)
    store.insert_cache("m", first.ids, cache)
    for tail in ([5, 6, 7], [5, 9, 1, 2, 3], [11] * 30):
        prompt = merged.compress([Segment(shared + tail)])
        reused, rest = store.fetch_nearest_cache("m", prompt.ids)
        cached = len(prompt.ids) - len(rest)
        assert cached == 20
        assert_same(steps(model, prompt.after(cached), prompt_cache=reused), steps(model, prompt))
