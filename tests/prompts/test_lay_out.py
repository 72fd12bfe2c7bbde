"""Which tokens of a prompt merge. The ids must be those mlx-lm would make of the whole text."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import NewlineTokenizer
from mlx_lm.tokenizer_utils import load as load_tokenizer

from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.errors import PromptError
from kmerge_mlx.prompts.lay_out import ALL, ChatTemplate, Layout, lay_out
from kmerge_mlx.prompts.segments import encode
from kmerge_mlx.prompts.tags import parse
from tests.cli_runner import CHATML
from tests.conftest import UPSTREAM

TRIMMING = CHATML.replace("message.content", "message.content | trim")
COUNTING = CHATML.replace("{{ message.content", "{{ message.content | length }} {{ message.content")
TREE = "Tree: JN\n+WO"


@cache
def tokenizer_with(template: str | None = None):
    tokenizer = load_tokenizer(UPSTREAM / "base")
    tokenizer._tokenizer.chat_template = template
    return tokenizer


def flat(segments):
    return [i for segment in segments for i in segment.ids]


def merged_text(tokenizer, segments):
    return "".join(tokenizer.decode(list(s.ids)) for s in segments if s.merge)


def test_a_context_merges_and_a_prompt_does_not():
    tokenizer = tokenizer_with()
    (segment,) = lay_out(tokenizer, TREE, None)
    assert (segment.merge, segment.ids) == (True, tokenizer.encode(TREE))
    assert lay_out(tokenizer, parse(TREE), None) == [segment]
    (segment,) = lay_out(tokenizer, None, "Child: WO")
    assert not segment.merge
    segments = lay_out(tokenizer, TREE, "Child: WO, Answer: ")
    assert [segment.merge for segment in segments] == [True, False]
    assert TREE.startswith(merged_text(tokenizer, segments))
    assert flat(segments) == tokenizer.encode(f"{TREE}{CONTEXT_SEPARATOR}Child: WO, Answer: ")
    with pytest.raises(PromptError, match="prompt is empty"):
        lay_out(tokenizer, None, None)


@pytest.mark.parametrize("template", [CHATML, TRIMMING])
@pytest.mark.parametrize("context", [TREE, "  \n padded", "user", "<|im_start|>user\n"])
def test_a_chat_template_stays_raw_around_the_context(template, context):
    tokenizer = tokenizer_with(template)
    chat = ChatTemplate(system_prompt="Answer in one word.")
    segments = lay_out(tokenizer, context, "Child: WO?", chat)
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": f"{context}{CONTEXT_SEPARATOR}Child: WO?"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert flat(segments) == ids
    assert [segment.merge for segment in segments] == [False, True, False]
    merged = merged_text(tokenizer, segments)
    assert merged in context
    assert len(merged) >= len(context.strip()) - 2  # a token on the border stays raw


def test_a_template_merges_with_a_context_alone_where_the_layout_says_so():
    tokenizer = tokenizer_with(CHATML)
    (segment,) = lay_out(tokenizer, "Tree: JN", None, ChatTemplate(), Layout(ALL))
    assert segment.merge
    assert tokenizer.decode(segment.ids).startswith("<|im_start|>user")
    segments = lay_out(tokenizer, "Tree: JN", None, ChatTemplate())
    assert [segment.merge for segment in segments] == [False, True, False]
    assert merged_text(tokenizer, segments) == "Tree: JN"
    segments = lay_out(tokenizer, None, "Child?", ChatTemplate(prefill_response="It is"))
    assert tokenizer.decode(flat(segments)).endswith("<|im_start|>assistant\nIt is")


def test_a_template_that_rewrites_the_text_is_refused_only_where_it_matters():
    tokenizer = tokenizer_with(COUNTING)
    with pytest.raises(PromptError, match=r"rewrites the text.*ignore_chat_template"):
        lay_out(tokenizer, "tree", "child", ChatTemplate())
    assert lay_out(tokenizer, "tree", None, ChatTemplate(), Layout(ALL))[0].merge


ALPHABET = st.text(alphabet="Tre: JNWO+\n é漢🙂<|im_start>user", min_size=1, max_size=40)


@given(ALPHABET, ALPHABET, st.sampled_from([None, CHATML, TRIMMING]))
@settings(max_examples=150, deadline=None)
def test_segments_laid_end_to_end_are_the_whole_texts_ids(context, prompt, template):
    tokenizer = tokenizer_with(template)
    chat = None if template is None else ChatTemplate()
    try:
        segments = lay_out(tokenizer, context, prompt, chat)
    except PromptError:
        assert template == TRIMMING  # trimmed away to where it cannot be found
        return
    text = context + CONTEXT_SEPARATOR + prompt
    rendered = text if chat is None else chat.render(tokenizer, text)
    assert flat(segments) == tokenizer.encode(rendered, add_special_tokens=chat is None)
    assert merged_text(tokenizer, segments) in context
    assert sum(segment.merge for segment in segments) <= 1


class WithBos:
    """A tokenizer that adds a beginning-of-sequence token."""

    bos_token = "<s>"

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(c) for c in text]


def test_special_tokens_are_added_unless_the_text_has_them():
    assert encode(WithBos(), "a") == [0, 97]
    assert encode(WithBos(), "<s>a")[0] == ord("<")
    assert encode(tokenizer_with(), "A") == tokenizer_with().encode("A")


def test_a_tokenizer_without_offsets_of_its_own_tokens_is_refused_beside_a_raw_prompt():
    newline = NewlineTokenizer(tokenizer_object=tokenizer_with().backend_tokenizer)
    for tokenizer in (WithBos(), newline):
        assert lay_out(tokenizer, "tree", None)[0].merge
        with pytest.raises(PromptError, match="put all of it in one FILE"):
            lay_out(tokenizer, "tree", "child")
