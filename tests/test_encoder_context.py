"""An encoder that reads tokens before its block: the same prompts read in many ways.

Oracle: the merged embeddings of a plain loop over the tokens, read by mlx-lm as embeddings.
"""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

from kmerge_mlx import Segment
from kmerge_mlx.adapters.folder import load_adapter, save_adapter
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.model import attach, merged_embedding
from tests.tiny import PAD, build, prompts_of, qwen2_config, random_adapter, steps

K, C = 4, 3


def with_context(c: int):
    """A random K = 4 model whose encoder reads c tokens before each block."""
    model = build(qwen2_config())
    attach(model, random_adapter(model, K, context=c), PAD)
    return model


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


def test_generation_reads_what_a_plain_loop_over_the_tokens_gives():
    model = with_context(C)
    merged = merged_embedding(model)
    for length in (1, 4, 5, 101):
        ids = prompts_of(1, length, length, seed=length)[0]
        segments = [Segment([7, 8], False), Segment(ids), Segment([9], False), Segment(ids[:6])]
        prompt, rows = merged.compress(segments), naive_rows(model, segments)
        assert mx.abs(merged(mx.array(prompt.ids)) - rows).max().item() < 1e-5
        wanted = generate_step(mx.array([], mx.int32), model, max_tokens=6, input_embeddings=rows)
        assert_same(steps(model, prompt, 6), list(wanted))


@pytest.mark.parametrize("c", [0, C])
def test_a_prefix_from_the_cache_gives_the_logprobs_of_no_cache(c):
    """mlx-lm's own prompt cache, keyed by virtual ids: equal blocks are used again."""
    model, store = with_context(c), LRUPromptCache()
    merged, shared = merged_embedding(model), prompts_of(1, 80, 80, seed=8)[0]
    first = merged.compress([Segment(shared)])
    cache = make_prompt_cache(model)
    model(mx.array([first.ids]), cache=cache)
    store.insert_cache("m", first.ids, cache)
    for tail in ([5, 6, 7], [5, 9, 1, 2, 3], [11] * 30):
        for segments in ([Segment(shared + tail)], [Segment(shared), Segment(tail, False)]):
            prompt = merged.compress(segments)
            reused, rest = store.fetch_nearest_cache("m", prompt.ids)
            assert len(prompt.ids) - len(rest) == 20
            found = steps(model, prompt.after(20), prompt_cache=reused)
            assert_same(found, steps(model, prompt))
    other = merged.compress([Segment([1, *shared[1:]])])
    assert store.fetch_nearest_cache("m", other.ids) == (None, other.ids)


def test_a_reader_that_knows_no_context_refuses_the_tensors(tmp_path):
    """An older release reads past the key: its check of w1's shape must fail."""
    save_adapter(random_adapter(build(qwen2_config()), K, context=C), tmp_path / "a")
    path = tmp_path / "a" / "merge_config.json"
    config = json.loads(path.read_text())
    assert config.pop("encoder_context") == C
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"w1\.weight has shape \(512, 448\), expected .*256\)"):
        load_adapter(tmp_path / "a")
