"""LCLM checkpoints, from conversion to an answer, against PyTorch: the authors' code, and ours.

``fixtures/lclm_cs4_w16`` holds what the authors' code answers on a checkpoint of theirs.
``tests.reference.lclm`` makes others, and answers from the description. All of it is float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from safetensors.numpy import load_file

from kmerge_mlx import Segment
from kmerge_mlx.convert.window import convert_window
from kmerge_mlx.errors import PromptError
from kmerge_mlx.generation.conversation import Conversation
from kmerge_mlx.generation.stream import compress
from kmerge_mlx.model import load_source, merged_embedding
from kmerge_mlx.prompts.policy import Layout
from kmerge_mlx.prompts.segments import MergedText, segments_of
from kmerge_mlx.prompts.tags import Span, parse
from kmerge_mlx.source import Source
from kmerge_mlx.window_encoder import WindowEncoder
from tests.servers import FIXTURE_EOS, serving

AUTHORS = Path(__file__).parent / "fixtures" / "lclm_cs4_w16"
TREE = "AA\n+AB\n++AC\n+AD\n++AE\n++AF\n+++AG\n"
PROMPTS = (
    f"<|memory_start|>{TREE}<|memory_end|>, Parent: AA, Child: AB, Answer: ",
    f"Read <|memory_start|>{TREE * 5}<|memory_end|> and <|memory_start|>AX\n+AY<|memory_end|>?",
    "<|memory_start|>A<|memory_end|> B",
    "Nothing is merged here, Answer: ",
)
MADE: dict[str, dict[str, Any]] = {
    "n8w32": {"ratio": 8, "window": 32},
    "overlap": {"ratio": 4, "window": 16, "overlap": 8},
    "concat": {"ratio": 4, "window": 16, "pooling": "concat"},
    "lora": {"ratio": 4, "window": 16, "lora": True},
}


@dataclass
class Case:
    """A prompt, and what PyTorch makes of it."""

    prompt: str
    memory_ids: list[list[int]]
    latents: np.ndarray
    logits: np.ndarray
    greedy: list[int]


@dataclass
class Converted:
    """A converted checkpoint, loaded, and its cases."""

    source: Source
    model: Any
    tokenizer: Any
    cases: list[Case]

    def segments(self, prompt: str) -> list[Segment]:
        return segments_of(self.tokenizer, parse(tagged(prompt)), False)


def tagged(prompt: str) -> str:
    """A prompt with our tags where its text has LCLM's markers."""
    return prompt.replace("<|memory_start|>", "<merge>").replace("<|memory_end|>", "</merge>")


def authors_cases() -> list[Case]:
    tensors = load_file(AUTHORS / "expected.safetensors")
    nothing = np.zeros((0, 64), np.float32)
    return [
        Case(
            case["prompt"],
            case["memory_token_ids"],
            tensors.get(f"{i}.latents", nothing),
            tensors[f"{i}.logits"],
            case["greedy"],
        )
        for i, case in enumerate(json.loads((AUTHORS / "expected.json").read_text())["cases"])
    ]


@pytest.fixture(scope="module", params=["authors", *MADE])
def converted(request, tmp_path_factory) -> Converted:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = AUTHORS / "checkpoint"
    if request.param == "authors":
        cases = authors_cases()
    else:
        from tests.reference import lclm

        checkpoint = lclm.make(folder / "checkpoint", lclm.Sizes(**MADE[request.param]))
        reference = lclm.Reference(checkpoint)
        found = {prompt: reference.answer(prompt) for prompt in PROMPTS}
        cases = [
            Case(prompt, e.memory_ids, e.latents.numpy(), e.logits.numpy(), e.greedy)
            for prompt, e in found.items()
        ]
    convert_window(checkpoint, "it", folder / "made")
    source = Source.find(None, folder / "made")
    return Converted(source, *load_source(source)[:2], cases)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits.astype(np.float64))


def test_it_reads_what_pytorch_reads(converted):
    for case in converted.cases:
        segments = converted.segments(case.prompt)
        assert [[*s.ids] for s in segments if s.merge] == case.memory_ids
        prompt = compress(converted.model, converted.tokenizer, segments)
        virtual = [i for i in prompt.ids if i >= 703]
        assert len(virtual) == len(case.latents)
        if virtual:
            rows = np.array(merged_embedding(converted.model)(mx.array(virtual)))
            np.testing.assert_allclose(rows, case.latents, rtol=0, atol=1e-4)
        logits = np.array(converted.model(mx.array([prompt.ids]))[0, -1])
        np.testing.assert_allclose(logits, case.logits, rtol=0, atol=1e-3)
        gap = np.abs(log_softmax(logits) - log_softmax(case.logits)).max()
        assert gap < 1e-4


def test_greedy_answers_are_pytorchs_one_by_one_and_in_a_batch(converted):
    model, tokenizer = converted.model, converted.tokenizer
    prompts = [compress(model, tokenizer, converted.segments(c.prompt)) for c in converted.cases]
    expected = [case.greedy for case in converted.cases]
    one_by_one = [
        [int(token) for token, _ in generate_step(mx.array(p.ids), model, max_tokens=16)]
        for p in prompts
    ]
    assert one_by_one == expected
    generator = BatchGenerator(model, stop_tokens=[])  # past the end of text, as PyTorch went on
    uids = generator.insert([[*p.ids] for p in prompts], [16] * len(prompts))
    rows: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            rows[response.uid].append(response.token)
    generator.close()
    assert [rows[uid] for uid in uids] == expected


def test_what_a_prompt_has_in_common_with_an_earlier_one_is_not_read_again(converted, monkeypatch):
    read: list[int] = []
    whole = WindowEncoder._read

    def counted(self, batch):
        read.extend(min(self.config.window, len(run) - start) for run, start, _ in batch)
        return whole(self, batch)

    monkeypatch.setattr(WindowEncoder, "_read", counted)
    model, tokenizer = converted.model, converted.tokenizer
    merged_embedding(model).forget_blocks()
    draw = np.random.default_rng(0)
    shared = draw.integers(3, 700, 3000).tolist()
    first = compress(model, tokenizer, [Segment(shared)])
    assert sum(read) == 3000
    read.clear()
    second = compress(model, tokenizer, [Segment([*shared, 5, 6, 7])])
    window = merged_embedding(model).encoder.config.window
    assert sum(read) <= window
    k = merged_embedding(model).merge_factor
    assert second.ids[: 3000 // k] == first.ids[: 3000 // k]


def test_no_text_can_spell_what_stands_around_a_merged_text(converted):
    for text in ("<|memory_end|>", "a <|memory_start|>b<|memory_end|>", "<|memory|>"):
        raw, merged = (
            segments_of(converted.tokenizer, parse(whole), False)
            for whole in (text, f"<merge>{text}</merge>")
        )
        assert not any(i >= 700 for s in raw for i in s.ids)
        assert [i for s in merged for i in s.ids if i >= 700] == [701, 702]
        assert converted.tokenizer.decode(raw[0].ids) == text


def test_the_server_and_a_conversation_say_the_same(converted):
    case = converted.cases[0]
    end = case.greedy.index(FIXTURE_EOS) if FIXTURE_EOS in case.greedy else len(case.greedy)
    whole = converted.tokenizer.decode(case.greedy[:end])
    source = converted.source
    with serving(source.model, source.adapter_path) as address:
        for _ in range(2):  # the second time, the cache holds its beginning
            answer = address.complete(prompt=tagged(case.prompt), max_tokens=16, temperature=0)
            choice, usage = answer.json["choices"][0], answer.json["usage"]
            assert choice["text"] == whole
            assert usage["merged_tokens"] == len(case.memory_ids[0])
    conversation = Conversation(
        converted.model, converted.tokenizer, Layout(chat_template=False), context=TREE * 9
    )
    first = "".join(r.text for r in conversation.ask("Who?", max_tokens=3))
    held = conversation.history.positions
    second = [r.token for r in conversation.ask("And then?", max_tokens=5)]
    assert first
    assert conversation.history.cached >= held - 1
    told = compress(
        converted.model, converted.tokenizer, converted.segments(f"<merge>{TREE * 9}</merge>")
    )
    assert told.ids == conversation._prompt.ids[: len(told.ids)]
    again = mx.array(conversation._prompt.ids)
    model = converted.model
    assert second == [int(t) for t, _ in generate_step(again, model, max_tokens=5)][: len(second)]


def test_batches_of_windows_are_bounded_and_change_nothing(converted, monkeypatch):
    model, tokenizer = converted.model, converted.tokenizer
    ids = np.random.default_rng(1).integers(3, 700, 333).tolist()
    embedding = merged_embedding(model)
    rows = []
    for most in (4096, 1):
        monkeypatch.setattr("kmerge_mlx.window_encoder.TOKENS_AT_ONCE", most)
        embedding.forget_blocks()
        rows.append(np.array(embedding(mx.array(compress(model, tokenizer, [Segment(ids)]).ids))))
    np.testing.assert_allclose(*rows, rtol=0, atol=1e-5)


def test_a_tokenizer_that_knows_the_two_tokens_is_not_given_them_by_a_text(converted):
    tokenizer = converted.tokenizer
    spelled = tokenizer.encode("A", add_special_tokens=False)
    known = MergedText(tokenizer.merged_text.tokenizer, spelled[0], 702)
    with pytest.raises(PromptError, match="spells a token that only a merged text has"):
        known.segments(tokenizer, [Span("A", False)], False, False)
    assert known.segments(tokenizer, [Span("A", True)], False, False)
