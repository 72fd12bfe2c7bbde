"""Conversations: every turn is one long prompt, of which only what is new is read."""

from __future__ import annotations

from random import Random

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from kmerge_mlx import stream_generate
from kmerge_mlx.errors import PromptError
from kmerge_mlx.generation.conversation import Conversation
from kmerge_mlx.prompts.lay_out import ALL, Layout, lay_out_chat
from tests.cli_runner import CHATML, copy_base

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS += ["4,711", "Ada"]


@pytest.fixture(scope="module")
def chatty(tiny, base_path, tmp_path_factory):
    """A random K = 4 model and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "base"
    return tiny[0], load_tokenizer(copy_base(base_path, folder, CHATML))


def answer_to_all_at_once(chatty, talk, layout, count):
    """What the model answers to the whole of a conversation without its last answer."""
    segments = lay_out_chat(chatty[1], talk.messages[:-1], layout)
    return list(stream_generate(*chatty, segments, count))


def question(random, low=3, high=40):
    return " ".join(random.choices(WORDS, k=random.randint(low, high)))


@pytest.mark.parametrize(
    ("layout", "ratio"),
    [
        (Layout("documents", 8), 1.1),  # questions stay raw, earlier ones too
        (Layout("contexts", 8), 1.5),
        (Layout(ALL), 1.5),
        (Layout("contexts", 8, chat_template=False), 1.5),
        (Layout("contexts", 8, keep=("numbers", "names")), 1.2),
        (Layout(ALL, keep=("numbers", "names")), 1.2),
    ],
    ids=["documents", "contexts", "all", "no template", "kept", "all but kept"],
)
def test_every_turn_is_one_long_prompt(chatty, layout, ratio):
    random = Random(1)
    talk = Conversation(*chatty, layout, context=question(random, 60, 60))
    for turn in range(7):
        asked = list(talk.ask(question(random), max_tokens=6))
        whole = answer_to_all_at_once(chatty, talk, layout, 6)
        assert [r.token for r in asked] == [r.token for r in whole]
        for ours, theirs in zip(asked, whole, strict=True):
            assert mx.allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        if turn:
            assert talk.history.cached > 10
            assert asked[0].prompt_tokens < whole[0].prompt_tokens / 2 or turn < 4
    assert talk.history.turns == 7
    assert len(talk.messages) == 14
    assert talk.history.tokens > ratio * talk.history.positions


def test_an_answer_that_is_stopped_stays_as_far_as_it_went(chatty):
    talk = Conversation(*chatty)
    answer = talk.ask("one two three", max_tokens=50)
    begun = next(answer).text + next(answer).text
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": begun}
    asked = list(talk.ask("four", max_tokens=5))
    whole = answer_to_all_at_once(chatty, talk, Layout(), 5)
    assert [r.token for r in asked] == [r.token for r in whole]


def test_a_conversation_that_is_too_long_changes_nothing(chatty, monkeypatch):
    monkeypatch.setattr(chatty[0], "context_length", 200)
    talk = Conversation(*chatty, Layout(ALL))
    first = list(talk.ask("one", max_tokens=3))
    before, history = list(talk.messages), talk.history
    with pytest.raises(PromptError, match="the model's context is"):
        list(talk.ask("word " * 2_000, max_tokens=3))
    with pytest.raises(PromptError, match="is never closed"):
        list(talk.ask("<raw>", max_tokens=3))
    assert (talk.messages, talk.history) == (before, history)
    talk.reset()
    assert talk.history.turns == 0
    assert [r.token for r in talk.ask("one", max_tokens=3)] == [r.token for r in first]


def test_a_full_rotating_cache_is_read_anew(chatty):
    talk = Conversation(*chatty, Layout(threshold=8), max_kv_size=24)
    for turn in range(4):
        list(talk.ask(" ".join(WORDS[turn:] * 3), max_tokens=4))
    assert talk.history.turns == 4
