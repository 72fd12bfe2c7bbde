"""Examples as token ids: the prompt is generation's, the answer is mlx-lm's, nothing is lost."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset

from kmerge_mlx.data.examples import Example, RowFormat
from kmerge_mlx.data.layout import tokenize
from kmerge_mlx.errors import DataError, KMergeError
from kmerge_mlx.prompts.lay_out import ALL, ChatTemplate, Layout, lay_out
from tests.conftest import UPSTREAM
from tests.prompts.test_lay_out import CHATML, COUNTING

END_OF_TEXT, IM_END = 0, 2
# The generation prompt begins with what a finished conversation does not have.
REWRITING = CHATML.replace("assistant\n{% if", "assistant\n<think>\n{% if")
REFUSING = "{{ raise_exception('only one turn') }}"


@cache
def tokenizer_with(template: str | None = None, eos: str = "<|endoftext|>"):
    tokenizer = load_tokenizer(UPSTREAM / "base", eos_token_ids=None)
    tokenizer._tokenizer.chat_template = template
    tokenizer._tokenizer.eos_token = eos
    wrapped = type(tokenizer)(tokenizer._tokenizer)
    assert wrapped.eos_token_ids == {tokenizer._tokenizer.eos_token_id}
    return wrapped


TEXT = st.text(alphabet="Tre: JNWO+\n é漢🙂.,x", min_size=1, max_size=30).filter(str.strip)


@given(TEXT, TEXT)
@settings(max_examples=50, deadline=None)
def test_without_a_template_prompt_and_answer_are_tokenized_apart(prompt, answer):
    tokenizer = tokenizer_with()
    found = tokenize(tokenizer, Example(prompt, None, answer))
    assert found.prompt_ids == tokenizer.encode(prompt)
    assert found.answer_ids == [*tokenizer.encode(answer), END_OF_TEXT]
    assert tokenizer.decode(found.prompt_ids + found.answer_ids[:-1]) == prompt + answer


@given(TEXT, st.none() | TEXT, TEXT)
@settings(max_examples=50, deadline=None)
def test_completions_are_cut_where_mlx_lm_cuts_them(context, prompt, answer):
    tokenizer = tokenizer_with(CHATML)
    text = context if prompt is None else f"{context}\n\n{prompt}"
    row = {"prompt": text, "completion": answer}
    data = CompletionsDataset([row], tokenizer, "prompt", "completion", mask_prompt=True)
    ids, offset = data.process(row)
    found = tokenize(tokenizer, Example(context, prompt, answer))
    assert found.prompt_ids == ids[:offset]
    assert found.answer_ids == [*ids[offset:], END_OF_TEXT]
    assert found.segments == lay_out(tokenizer, context, prompt, ChatTemplate())


TURNS = st.lists(TEXT, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0)


@given(TURNS, st.booleans())
@settings(max_examples=50, deadline=None)
def test_conversations_are_cut_where_mlx_lm_cuts_them_and_merge_whole(turns, system):
    tokenizer = tokenizer_with(CHATML)
    roles = ["user", "assistant"] * (len(turns) // 2)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    messages = [{"role": "system", "content": "Be brief."}] * system + messages
    row = {"messages": messages}
    ids, offset = ChatDataset([row], tokenizer, mask_prompt=True).process(row)
    found = tokenize(tokenizer, RowFormat().read(row), Layout(ALL))
    assert [(list(s.ids), s.merge) for s in found.segments] == [(ids[:offset], True)]
    assert found.answer_ids == [*ids[offset:], END_OF_TEXT]
    # Where contexts merge, the ids are the same.
    other = tokenize(tokenizer, RowFormat().read(row))
    assert (other.prompt_ids, other.answer_ids) == (ids[:offset], found.answer_ids)


def test_the_answer_ends_with_the_templates_own_eos_and_not_with_a_second():
    tokenizer = tokenizer_with(CHATML, "<|im_end|>")
    found = tokenize(tokenizer, Example("Tree", None, "true"), Layout(ALL))
    assert found.answer_ids == [*tokenizer.encode("true"), IM_END]  # and no "\n" after it
    chat = RowFormat().read({"messages": [message("user", "Tree"), message("assistant", "true")]})
    assert tokenize(tokenizer, chat, Layout(ALL)) == found


def message(role, content):
    return {"role": role, "content": content}


def test_a_text_gets_no_template_and_nothing_does_when_it_is_left_out():
    tokenizer = tokenizer_with(CHATML)
    text = tokenize(tokenizer, RowFormat().read({"text": "Tree: true", "split": 6}))
    completion = Example("Tree: ", None, "true")
    assert text == tokenize(tokenizer, completion, Layout(chat_template=False))
    assert text == tokenize(tokenizer_with(), completion)
    for ending in ("<|endoftext|>", "<|endoftext|>\n", "<|endoftext|> <|endoftext|>"):
        row = {"text": f"Tree: true{ending}", "split": 6}  # it has its eos token already
        assert tokenize(tokenizer, RowFormat().read(row)).answer_ids == text.answer_ids


def test_an_example_without_an_answer_is_its_prompt():
    tokenizer = tokenizer_with(CHATML)
    found = tokenize(tokenizer, Example("Tree", "Child?"))
    assert found.answer_ids == []
    assert found.segments == lay_out(tokenizer, "Tree", "Child?", ChatTemplate())
    asked = RowFormat(answers=False).read({"messages": [message("user", "Tree")]})
    alone = tokenize(tokenizer, Example(None, "Tree"))
    assert tokenize(tokenizer, asked).prompt_ids == alone.prompt_ids


def test_tools_reach_the_template():
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + CHATML
    tokenizer = tokenizer_with(template)
    row = {"prompt": "Tree", "completion": "true", "tools": [{"name": "search"}]}
    found = tokenize(tokenizer, RowFormat().read(row), Layout(ALL))
    assert tokenizer.decode(found.prompt_ids).startswith("search<|im_start|>user")
    turns = {"messages": [message("user", "Tree"), message("assistant", "true")]}
    turns |= {"tools": row["tools"]}
    assert tokenize(tokenizer, RowFormat().read(turns), Layout(ALL)) == found


def test_a_token_across_the_border_is_cut_there_and_no_character_lost():
    # "JN" is one token; here the generation prompt ends between its letters.
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tokenizer_with(template + "{% if false %}{% endif %}")
    assert len(tokenizer.encode("JN")) == 1
    found = tokenize(tokenizer, Example("J", None, "N"))
    assert found.prompt_ids == tokenizer.encode("J")
    assert found.answer_ids == [*tokenizer.encode("N"), END_OF_TEXT]


def test_a_template_that_cannot_do_it_is_refused_by_what_it_does():
    example = Example("tree", "child", "true")
    chat = Example(messages=(message("user", "a"), message("assistant", "b")))
    for template, refused, said in (
        (REWRITING, example, "writes the prompt otherwise"),
        (REFUSING, chat, "one turn"),
        (None, chat, "has none"),
        ("{{ messages[0].content }}", Example("Tree", None, "true"), "leaves the answer out"),
        (COUNTING, example, "rewrites the text"),  # as generation refuses it
    ):
        with pytest.raises(KMergeError, match=said) as caught:
            tokenize(tokenizer_with(template), refused)
        assert re.search("leave .* out|leave it out", str(caught.value))
    assert tokenize(tokenizer_with(COUNTING), example, Layout(chat_template=False)).answer_ids
    with pytest.raises(DataError, match="it is left out"):
        tokenize(tokenizer_with(CHATML), chat, Layout(chat_template=False))


class Letters:
    """A tokenizer of single characters that begins a text with <s>, as Llama's does."""

    has_chat_template = False
    bos_token = "<s>"

    def __init__(self, eos_token_id=2):
        self.eos_token_id = eos_token_id
        self.eos_token_ids = {eos_token_id} - {None}

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_beginning_of_text_token_begins_the_prompt_and_an_eos_token_must_end_the_answer():
    found = tokenize(Letters(), Example("ab", None, "c"))
    assert (found.prompt_ids, found.answer_ids) == ([1, 97, 98], [99, 2])
    with pytest.raises(DataError, match="no eos token"):
        tokenize(Letters(None), Example("a", None, "b"))
