"""LCLM checkpoints, from conversion to an answer, against PyTorch: the authors' code, and ours.

``fixtures/lclm_cs4_w16`` holds what the authors' code answers on a checkpoint of theirs.
``tests.reference.lclm`` makes others, and answers from the description. All of it is float32.
"""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile
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
from kmerge_mlx.generation.prompt_cache import CacheFile, identity, prefill
from kmerge_mlx.generation.stream import compress
from kmerge_mlx.model import load_source, merged_embedding, read_tokenizer
from kmerge_mlx.prompts.chat_template import ChatTemplate
from kmerge_mlx.prompts.lay_out import lay_out, lay_out_chat, lay_out_text
from kmerge_mlx.prompts.policy import Layout
from kmerge_mlx.prompts.segments import MergedText, segments_of
from kmerge_mlx.prompts.tags import Span, parse
from kmerge_mlx.source import Source
from kmerge_mlx.window_encoder import WindowEncoder
from tests.cli_runner import CHATML, change_json, copy_base, run
from tests.servers import FIXTURE_EOS, serving

AUTHORS = Path(__file__).parent / "fixtures" / "lclm_cs4_w16"
TREE = "AA\n+AB\n++AC\n+AD\n++AE\n++AF\n+++AG\n"
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

    checkpoint: Path
    source: Source
    model: Any
    tokenizer: Any
    cases: list[Case]

    def segments(self, prompt: str) -> list[Segment]:
        return segments_of(self.tokenizer, parse(tagged(prompt)), False)


def tagged(prompt: str) -> str:
    """A prompt with our tags where its text has LCLM's markers."""
    return prompt.replace("<|memory_start|>", "<merge>").replace("<|memory_end|>", "</merge>")


def before_the_end(tokens: list[int]) -> list[int]:
    """The tokens of an answer, without the one that ends it."""
    return [*takewhile(lambda token: token != FIXTURE_EOS, tokens)]


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
        found = {case.prompt: reference.answer(case.prompt) for case in authors_cases()}
        cases = [
            Case(prompt, e.memory_ids, e.latents.numpy(), e.logits.numpy(), e.greedy)
            for prompt, e in found.items()
        ]
    convert_window(checkpoint, "it", folder / "made")
    source = Source.find(None, folder / "made")
    return Converted(checkpoint, source, *load_source(source)[:2], cases)


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


@pytest.mark.parametrize("window", [16, 1024])
def test_what_a_prompt_has_in_common_with_an_earlier_one_is_not_read_again(
    tmp_path, monkeypatch, window
):
    """Two prompts of 3,500 tokens share 3,000; docs/lclm.md has the figures of W = 1,024."""
    checkpoint = shutil.copytree(AUTHORS / "checkpoint", tmp_path / "checkpoint")
    change_json(checkpoint / "model_config.json", encoder_window_size=window)
    convert_window(checkpoint, "it", tmp_path / "made")
    model, tokenizer, _ = load_source(Source.find(None, tmp_path / "made"))
    read: list[tuple[int, int]] = []  # the tokens of each window, by their places in the prompt
    whole = WindowEncoder._read

    def counted(self, batch):
        read.extend((start, min(start + window, len(run))) for run, start, _ in batch)
        return whole(self, batch)

    monkeypatch.setattr(WindowEncoder, "_read", counted)
    draw = np.random.default_rng(0)
    shared, *ends = (draw.integers(3, 700, size).tolist() for size in (3000, 500, 500))
    first = compress(model, tokenizer, [Segment(shared + ends[0])])
    assert sum(end - start for start, end in read) == 3500
    read.clear()
    second = compress(model, tokenizer, [Segment(shared + ends[1])])
    assert len(read) == -(-3500 // window) - 3000 // window
    assert sum(max(0, min(end, 3000) - start) for start, end in read) == 3000 % window
    assert [a == b for a, b in zip(first.ids, second.ids, strict=True)] == [True] * 750 + [
        False
    ] * 125
    if window == 1024:
        assert read == [(2048, 3072), (3072, 3500)]


def test_no_text_can_spell_what_stands_around_a_merged_text(converted):
    for text in ("<|memory_end|>", "a <|memory_start|>b<|memory_end|>", "<|memory|>"):
        raw, merged = (
            segments_of(converted.tokenizer, parse(whole), False)
            for whole in (text, f"<merge>{text}</merge>")
        )
        assert not any(i >= 700 for s in raw for i in s.ids)
        assert [i for s in merged for i in s.ids if i >= 700] == [701, 702]
        assert converted.tokenizer.decode(raw[0].ids) == text


SPELLED = "A <|memory_start|>B<|memory|><|memory_end|>, </merge><|memory_end|> " * 9


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("merges", ["documents", "contexts", "all"])
def test_the_two_tokens_stand_around_merged_texts_alone_however_a_prompt_is_made(
    converted, tmp_path, template, merges
):
    folder = copy_base(converted.source.path, tmp_path / "base", template)
    tokenizer = read_tokenizer(replace(converted.source, path=folder))
    layout, chat = Layout(merges), template and ChatTemplate(SPELLED)
    span = [Span(SPELLED)]
    prompts = [lay_out(tokenizer, *texts, chat, layout) for texts in ((span, span), (None, span))]
    prompts += [lay_out_text(tokenizer, SPELLED.replace("</merge>", ""), layout)]
    for merge in (True, False):
        said = {"content": SPELLED, "merge": merge}
        roles = ("system", "user", "assistant", "tool", "user")
        prompts.append(lay_out_chat(tokenizer, [{"role": r} | said for r in roles], layout))
    wrote = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SPELLED}]
    wrote += [{"role": "tool", "content": SPELLED}, {"role": "user", "content": "!"}]
    prompts.append(lay_out_chat(tokenizer, wrote, layout))
    for prompt in prompts:
        merged = sum(segment.merge for segment in prompt)
        found = [i for segment in prompt for i in segment.ids if i >= 700]
        assert found == [701, 702] * merged
        for before, segment, after in zip(prompt, prompt[1:], prompt[2:], strict=False):
            assert not segment.merge or (before.ids[-1], after.ids[0]) == (701, 702)


def test_greedy_answers_are_pytorchs_from_a_prompt_cache_file(converted, tmp_path):
    """Written, and read with an empty block table, as a process of its own would."""
    model, tokenizer = converted.model, converted.tokenizer
    for case in converted.cases:
        *held, last = converted.segments(case.prompt)
        held += [Segment(last.ids[:-1], False)] if last.ids[1:] else []
        kept = CacheFile(tmp_path / "kept.safetensors", identity(converted.source), held, {})
        kept.save(prefill(model, compress(model, tokenizer, held)))
        merged_embedding(model).forget_blocks()
        found = CacheFile.read(kept.path)
        found.check(identity(converted.source))
        start = compress(model, tokenizer, found.held)
        cache = found.load(model, len(start.ids))
        whole = compress(model, tokenizer, converted.segments(case.prompt))
        assert whole.ids[:-1] == start.ids
        rest = mx.array(whole.after(len(start.ids)).ids)
        answer = generate_step(rest, model, max_tokens=16, prompt_cache=cache)
        assert [int(token) for token, _ in answer] == case.greedy


@pytest.mark.parametrize("number", range(6))
def test_the_commands_answer_as_pytorch_does_from_a_prompt_cache_file(converted, tmp_path, number):
    case, file = converted.cases[number], tmp_path / "kept.safetensors"
    named = ("--model", converted.source.model, "--adapter-path", converted.source.adapter_path)
    # The question begins with a token: after the last merged text but one, if that ends the prompt.
    borders = [m.end() for m in re.finditer(r"<\|memory_end\|>|^No\w*|^x", case.prompt)]
    at = next(place for place in reversed(borders) if place < len(case.prompt))
    begun, question = tagged(case.prompt[:at]), tagged(case.prompt[at:])
    done = run("cache", *named, "-p", begun, "--prompt-cache-file", file)
    assert done.code == 0, done.err
    line = ("--prompt-cache-file", file, "-p", question, "-m", 16, "--temp", 0, "--json")
    done = run("generate", *line)
    assert done.code == 0, done.err
    assert json.loads(done.out)["tokens"] == before_the_end(case.greedy)


def test_greedy_answers_are_pytorchs_through_the_server(converted):
    """One by one, the second time from the server's cache; then all at once."""
    source = converted.source
    with serving(source.model, source.adapter_path) as address, ThreadPoolExecutor(6) as pool:

        def ask(case: Case) -> tuple[str, int]:
            answer = address.complete(prompt=tagged(case.prompt), max_tokens=16, temperature=0)
            usage = answer.json["usage"]
            return answer.json["choices"][0]["text"], usage["merged_tokens"]

        expected = []
        for case in converted.cases:
            text = converted.tokenizer.decode(before_the_end(case.greedy))
            expected.append((text, sum(map(len, case.memory_ids))))
        assert [1] in [[*map(len, case.memory_ids)] for case in converted.cases]  # merges, too
        for _ in range(2):
            assert list(map(ask, converted.cases)) == expected
        assert list(pool.map(ask, converted.cases * 2)) == expected * 2


def test_greedy_answers_are_pytorchs_through_a_restarted_server(converted, tmp_path):
    named, folder = (converted.source.model, converted.source.adapter_path), str(tmp_path / "kept")
    case = max(converted.cases, key=lambda case: sum(map(len, case.memory_ids)))
    text = converted.tokenizer.decode(before_the_end(case.greedy))
    for restarted in (False, True):
        with serving(*named, prompt_cache_dir=folder) as address:
            answer = address.complete(prompt=tagged(case.prompt), max_tokens=16, temperature=0)
            usage = answer.json["usage"]
            assert answer.json["choices"][0]["text"] == text
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert cached >= usage["merged_tokens"] // 2 if restarted else cached == 0
            address.server.service.drain(60)


@pytest.mark.parametrize("second", ["And then?", f"<merge>{TREE}</merge>And here?"])
def test_a_conversations_second_answer_is_pytorchs(converted, second):
    """After a first turn, whose positions are not read again; the history is one long prompt."""
    from tests.reference import lclm

    conversation = Conversation(
        converted.model, converted.tokenizer, Layout(chat_template=False), context=TREE * 9
    )
    first = "".join(r.text for r in conversation.ask("Who?", max_tokens=3))
    held = conversation.history.positions
    answer = [r.token for r in conversation.ask(second, max_tokens=16)]
    assert conversation.history.cached >= held - 1
    history = f"<merge>{TREE * 9}</merge>\n\nWho?\n\n{first}\n\n{second}"
    history = history.replace("<merge>", "<|memory_start|>").replace("</merge>", "<|memory_end|>")
    greedy = lclm.Reference(converted.checkpoint).answer(history).greedy
    assert before_the_end(answer) == before_the_end(greedy)
    assert len(answer) > 2


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
