"""Generation over compressed prompts: batches, caches, penalties, long prompts.

Oracles: mlx-lm itself (its processors on the original ids, its generation on the rows), and the
same prompts read another way.
"""

from __future__ import annotations

import gc
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import load as load_tokenizer

from kmerge_mlx import Segment, batch_generate, compress, generate, stream_generate
from kmerge_mlx.errors import ModelError, PromptError
from kmerge_mlx.generation.stream import over_original_ids
from kmerge_mlx.model import attach, merged_embedding
from tests.conftest import UPSTREAM
from tests.tiny import PAD, build, prompts_of, qwen2_config, random_adapter, steps

V = 700


def test_responses_count_original_tokens_and_positions(tiny):
    responses = list(stream_generate(*tiny, list(range(1, 11)), max_tokens=3))
    last = responses[-1]
    assert (last.prompt_tokens, last.compressed_tokens) == (10, 3)
    assert last.compression_ratio == 10 / 3
    assert last.prompt_tps == pytest.approx(10 / last.time_to_first_token)
    assert [r.generation_tokens for r in responses] == [1, 2, 3]
    assert len({r.time_to_first_token for r in responses}) == 1
    streamed = "".join(r.text for r in responses)
    assert generate(*tiny, list(range(1, 11)), max_tokens=3) == streamed


def test_text_ids_arrays_segments_and_compressed_prompts_are_one_prompt(tiny):
    model, tokenizer = tiny
    text = "Tree: JN\n+WO, Task: "
    ids = tokenizer.encode(text)
    forms = [text, ids, tuple(ids), mx.array(ids), np.array(ids), [np.int64(i) for i in ids]]
    forms += [Segment(ids), [Segment(ids)], compress(*tiny, text)]
    assert len({tuple(compress(model, tokenizer, form).ids) for form in forms}) == 1
    plain = tokenizer._tokenizer  # Hugging Face's own
    whole = generate(model, tokenizer, text, max_tokens=4)
    assert generate(model, plain, text, max_tokens=4) == whole
    assert batch_generate(model, plain, [text], max_tokens=4).texts


def test_a_prompt_compressed_for_another_model_is_refused(tiny):
    model, tokenizer = tiny
    bare, other = build(qwen2_config()), build(qwen2_config())
    attach(other, random_adapter(other, 2), PAD)
    for made_for, read_by in ((model, bare), (model, other), (bare, model)):
        prompt = compress(made_for, tokenizer, [1, 2, 3, 4, 5])
        with pytest.raises(PromptError, match="compressed for another model"):
            next(stream_generate(read_by, tokenizer, prompt))


def test_what_is_not_a_prompt_is_refused(tiny):
    for prompt in (
        *([1.5, 2.0], [[1, 2], [3]], np.ones((2, 2), np.int32), ["a", "b"], [{"role": "user"}]),
        *([Segment([1]), 3], [3, Segment([1])], b"abc", None, 3),
    ):
        with pytest.raises(PromptError, match="the prompt is not text, token ids or segments: "):
            compress(*tiny, prompt)


def test_what_cannot_be_generated_is_refused_and_a_batch_names_the_prompt(tiny):
    model, tokenizer = tiny
    with pytest.raises(ModelError, match="draft model"):
        next(stream_generate(*tiny, [1, 2], draft_model=model))
    whole, caches = compress(model, tokenizer, [1, 2, 3, 4, 5]), [make_prompt_cache(model)]
    for call, prompt, options, said in (
        *((generate, empty, {}, "the prompt is empty") for empty in ("", [], [Segment([])])),
        (generate, whole.after(len(whole.ids)), {}, "cache holds all of the prompt"),
        (generate, [1], {"max_tokens": 0}, "max_tokens is 0: give at least 1, or -1"),
        (batch_generate, [[1]], {"max_tokens": -1}, r"max_tokens is -1: give at least 1$"),
        (batch_generate, [[1], [2]], {"prompt_caches": caches}, "2 prompts, 1 prompt_caches and 2"),
        (batch_generate, [[1], [], [2]], {}, "prompt 1: the prompt is empty"),
    ):
        with pytest.raises(PromptError, match=said):
            call(*tiny, prompt, **options)


def test_a_prompt_past_the_context_is_refused_with_what_is_cached_counted(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(model, "context_length", 10)
    assert next(stream_generate(*tiny, [1] * 40, max_tokens=1))
    cache = make_prompt_cache(model)
    model(mx.array([compress(model, tokenizer, [1] * 20).ids]), cache=cache)
    for prompt, options, said in (
        ([1] * 41, {}, r"11 positions.*41 tokens.*context is 10.*larger K"),
        ([1] * 21, {"prompt_cache": cache}, r"6 positions.*on top of 5 in the cache"),
        ([Segment([1] * 11, False)], {}, r"has 11 positions, and .* is 10: shorten it$"),
    ):
        with pytest.raises(PromptError, match=said):
            next(stream_generate(*tiny, prompt, **options))
    known = len(merged_embedding(model).table)
    with pytest.raises(PromptError, match="100 positions"):
        batch_generate(*tiny, [list(range(100, 500)), [1, 2, 3]])
    assert len(merged_embedding(model).table) == known  # a refused prompt costs no encoding


def test_a_batch_of_16_lengths_equals_one_by_one_token_by_token(tiny):
    model, tokenizer = tiny
    prompts = prompts_of(16, 1, 300)
    assert len({len(prompt) for prompt in prompts}) > 12
    wanted = {"return_token_ids": True, "return_logprobs": True}
    sizes = {"completion_batch_size": 5, "prefill_batch_size": 2}  # their order stays
    found = batch_generate(model, tokenizer, prompts, max_tokens=12, **wanted, **sizes)
    for prompt, tokens, logprobs in zip(prompts, found.token_ids, found.logprobs, strict=True):
        alone = steps(model, compress(model, tokenizer, prompt), 12)
        stop = next((i for i, (t, _) in enumerate(alone) if t in tokenizer.eos_token_ids), 12)
        assert tokens == [token for token, _ in alone[:stop]]
        for value, (token, wanted) in zip(logprobs, alone[:stop], strict=True):
            assert abs(value - wanted[token].item()) < 1e-4
    assert found.prompt_tokens == [len(prompt) for prompt in prompts]
    assert found.compressed_tokens == [-(-len(prompt) // 4) for prompt in prompts]


def test_batch_limits_progress_and_finish_reasons(tiny):
    seen = []
    options = {"progress": lambda *counts: seen.append(counts), "return_token_ids": True}
    found = batch_generate(*tiny, prompts_of(3), max_tokens=[1, 5, 2], **options)
    assert [len(tokens) for tokens in found.token_ids] == [1, 5, 2]
    assert found.finish_reasons == ["length"] * 3
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_ctrl_c_while_a_batch_is_set_up_is_all_that_is_said(tiny, monkeypatch):
    """mlx-lm's generator is then deleted half made."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)

    def stop():
        raise KeyboardInterrupt

    inside = BatchGenerator.__init__.__globals__
    monkeypatch.setitem(inside, "maybe_set_recommended_wired_limit", stop)
    with pytest.raises(KeyboardInterrupt):
        batch_generate(*tiny, prompts_of(1), max_tokens=1)
    gc.collect()
    assert not said


def test_the_blocks_of_a_batch_in_flight_are_never_reused(tiny):
    model, tokenizer = tiny
    small = build(qwen2_config())
    attach(small, random_adapter(small, 4), PAD, max_blocks=40)
    prompts = prompts_of(6, 20, 24, seed=5)
    for _ in range(4):
        found = batch_generate(small, tokenizer, prompts, max_tokens=3, return_token_ids=True)
        wanted = batch_generate(model, tokenizer, prompts, max_tokens=3, return_token_ids=True)
        assert found.token_ids == wanted.token_ids
        prompts = [[(i + 7) % V or 1 for i in prompt] for prompt in prompts]


def test_batched_prompts_start_from_their_caches_without_changing_them(tiny):
    model, tokenizer = tiny
    merged = merged_embedding(model)
    whole = [merged.compress([Segment(ids)]) for ids in prompts_of(3, 40, 80, seed=4)]
    caches = []
    for prompt in whole:
        cache = make_prompt_cache(model)
        model(mx.array([prompt.ids[:5]]), cache=cache)
        caches.append(cache)
    before = [int(cache[0].offset) for cache in caches]
    rest = [prompt.after(5) for prompt in whole]
    options = {"max_tokens": 5, "return_token_ids": True}
    found = batch_generate(model, tokenizer, rest, prompt_caches=caches, **options)
    for prompt, tokens in zip(whole, found.token_ids, strict=True):
        assert tokens == [token for token, _ in steps(model, prompt, 5)]
    assert [cache[0].offset for cache in caches] == before


def test_kv_bits_and_max_kv_size_act_as_in_mlx_lm(tiny):
    model, tokenizer = tiny
    prompt = compress(model, tokenizer, prompts_of(1, 200, 200)[0])
    for options in (
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
        {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 20},
        {"max_kv_size": 24},
        {"prefill_step_size": 7},
    ):
        rows = merged_embedding(model)(mx.array(prompt.ids))
        wanted = generate_step(
            mx.array([], mx.int32), model, max_tokens=8, input_embeddings=rows, **options
        )
        found = stream_generate(model, tokenizer, prompt, max_tokens=8, **options)
        for response, (token, logprobs) in zip(found, wanted, strict=True):
            assert response.token == token
            assert mx.abs(response.logprobs - logprobs).max().item() < 1e-5


@pytest.mark.slow
def test_a_20_000_token_prompt_is_read_in_bounded_memory(tiny):
    """The encoder's activations must not grow with T: 20,000 tokens against 5,000."""
    model, tokenizer = tiny
    peaks = []
    for length in (5_000, 20_000):
        ids = prompts_of(1, length, length, seed=length)[0]
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        prompt = compress(model, tokenizer, ids)
        peaks.append(mx.get_peak_memory() - before)
        assert len(prompt.ids) == length // 4
    rows = 15_000 // 4 * 64 * 4
    assert peaks[1] - peaks[0] < 4 * rows  # the rows themselves, doubling included
    response = list(stream_generate(model, tokenizer, ids, max_tokens=2))[-1]
    assert (response.prompt_tokens, response.compressed_tokens) == (20_000, 5_000)


def test_a_model_without_an_adapter_reads_the_prompt_unmerged():
    model, tokenizer = build(qwen2_config()), load_tokenizer(UPSTREAM / "base")
    last = list(stream_generate(model, tokenizer, [1, 2, 3], max_tokens=2))[-1]
    assert (last.prompt_tokens, last.compressed_tokens, last.compression_ratio) == (3, 3, 1.0)
    assert isinstance(model.model.embed_tokens, nn.Embedding)


# Penalties and other logits processors see the original token ids, and cost no wait


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
            assert mx.abs(response.logprobs - wanted).max().item() < 1e-4
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
