"""Which tokens of a prompt, a conversation or a text merge, who says so, and that raw is exact.

The ids must be those that mlx-lm would make of the whole text.
"""

from __future__ import annotations

import json
import re
from functools import cache
from random import Random

import mlx.core as mx
import mlx_lm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import NewlineTokenizer, TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kmerge_mlx import compress, load, stream_generate
from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.config import CONTEXT_SEPARATOR
from kmerge_mlx.errors import PromptError
from kmerge_mlx.prompts.chat_template import ChatTemplate
from kmerge_mlx.prompts.lay_out import lay_out, lay_out_chat, lay_out_text, plain_messages
from kmerge_mlx.prompts.policy import ALL, Layout
from kmerge_mlx.prompts.segments import wants_special_tokens
from kmerge_mlx.prompts.tags import escape, parse
from tests.cli_runner import CHATML
from tests.conftest import UPSTREAM
from tests.tiny import build, qwen2_config, random_adapter, write_base

TRIMMING = CHATML.replace("message.content", "message.content | trim")
COUNTING = CHATML.replace("{{ message.content", "{{ message.content | length }} {{ message.content")
TREE = "Tree: JN\n+WO"


@cache
def tokenizer_with(template: str | None = None):
    tokenizer = load_tokenizer(UPSTREAM / "base")
    tokenizer._tokenizer.chat_template = template
    tokenizer.has_chat_template = template is not None
    return tokenizer


def ids_of(segments):
    return [i for segment in segments for i in segment.ids]


def merged(tokenizer, segments):
    return [tokenizer.decode(list(s.ids)) for s in segments if s.merge]


def merged_text(tokenizer, segments):
    return "".join(merged(tokenizer, segments))


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
    assert ids_of(segments) == tokenizer.encode(f"{TREE}{CONTEXT_SEPARATOR}Child: WO, Answer: ")
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
    assert ids_of(segments) == ids
    assert [segment.merge for segment in segments] == [False, True, False]
    merged = merged_text(tokenizer, segments)
    assert merged in context
    assert len(merged) >= len(context.strip()) - 2  # a token on the border stays raw


@pytest.mark.parametrize("template", [None, CHATML, TRIMMING, COUNTING])
@pytest.mark.parametrize("merge", [True, False])
def test_all_of_a_conversation_merges_or_none_of_it_with_the_ids_that_it_has_anyway(
    template, merge
):
    tokenizer = tokenizer_with(template)
    conversation = [
        {"role": "system", "content": ""},
        {"role": "user", "content": f" <merge>{TREE}</merge> <raw>exactly</raw> "},
        {"role": "assistant", "content": "<raw>", "merge": not merge},
    ]
    (segment,) = lay_out_chat(tokenizer, conversation, Layout(ALL), merge=merge)
    assert (segment.merge, segment.ids) == (
        merge,
        ids_of(lay_out_chat(tokenizer, plain_messages(conversation), Layout(ALL))),
    )


def test_what_the_layout_keeps_stays_raw_where_all_else_of_a_conversation_merges():
    tokenizer, layout = tokenizer_with(CHATML), Layout(keep=("numbers",))
    conversation = [{"role": "user", "content": f"{TREE} and 1234 of them, as they were"}]
    segments = lay_out_chat(tokenizer, conversation, layout, merge=True)
    assert [segment.merge for segment in segments] == [True, False, True]
    assert "1234" in tokenizer.decode(segments[1].ids)
    (segment,) = lay_out_chat(tokenizer, conversation, layout, merge=False)
    assert not segment.merge


def test_a_template_merges_with_a_context_alone_where_the_layout_says_so():
    tokenizer = tokenizer_with(CHATML)
    (segment,) = lay_out(tokenizer, "Tree: JN", None, ChatTemplate(), Layout(ALL))
    assert segment.merge
    assert tokenizer.decode(segment.ids).startswith("<|im_start|>user")
    segments = lay_out(tokenizer, "Tree: JN", None, ChatTemplate())
    assert [segment.merge for segment in segments] == [False, True, False]
    assert merged_text(tokenizer, segments) == "Tree: JN"
    segments = lay_out(tokenizer, None, "Child?", ChatTemplate(prefill_response="It is"))
    assert tokenizer.decode(ids_of(segments)).endswith("<|im_start|>assistant\nIt is")


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
    assert ids_of(segments) == tokenizer.encode(rendered, add_special_tokens=chat is None)
    assert merged_text(tokenizer, segments) in context
    assert sum(segment.merge for segment in segments) <= 1


class WithBos:
    """A tokenizer that has a beginning-of-sequence token."""

    bos_token = "<s>"

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(c) for c in text]


def test_special_tokens_are_added_unless_the_text_has_them():
    assert wants_special_tokens(WithBos(), "a")
    assert not wants_special_tokens(WithBos(), "<s>a")
    assert wants_special_tokens(tokenizer_with(), "A")


def test_a_tokenizer_without_offsets_of_its_own_tokens_is_refused_beside_a_raw_prompt():
    newline = NewlineTokenizer(tokenizer_object=tokenizer_with().backend_tokenizer)
    for tokenizer in (WithBos(), newline):
        assert lay_out(tokenizer, "tree", None)[0].merge
        with pytest.raises(PromptError, match=r"in one text without tags.* \(`merges` all\)"):
            lay_out(tokenizer, "tree", "child")


# Conversations and whole texts

LONG = "One two three four five six seven eight nine ten. " * 4
CONTEXTS, BARE = Layout("contexts", 8), Layout("contexts", 8, chat_template=False)
WORDS = ("Tree: ", "AB\n", "+", "++", "+CD", " word", "é木", "<raw ", "\n\n", "\\", "</b>", " ")


@pytest.fixture
def tokenizer():
    return tokenizer_with(CHATML)


def user(content, **more):
    return {"role": "user", "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "merges"),
    [
        ([user("Short?")], []),
        ([user(LONG)], []),  # one paragraph: it is the question
        ([user(f"{LONG}\n\nWhat is it?")], [LONG]),
        ([user(f"{LONG}\n\n{LONG}\n \nWhat is it?")], [f"{LONG}\n\n{LONG}"]),
        ([{"role": "system", "content": LONG}, user("What?")], []),
        ([{"role": "developer", "content": f"{LONG}\n\nx"}, user("What?")], []),
        ([user(LONG), {"role": "assistant", "content": LONG}, user("What?")], [LONG, LONG]),
        ([user(LONG, merge=True)], [LONG]),
        ([user("a <merge>b c d</merge> e")], ["b c d"]),
        ([user("a <merge>b c d</merge> e", merge=False)], []),
        ([{"role": "system", "content": "a", "merge": True}, user("What?")], ["a"]),
        ([user([{"type": "text", "text": LONG, "merge": True}, {"text": "What?"}])], [LONG]),
        ([user([{"text": f"{LONG}\n\n"}, {"text": "What?"}])], [LONG]),
        ([{"role": "tool", "content": LONG}, user("What?")], [LONG]),
    ],
)
def test_what_of_a_conversation_merges_by_default_and_by_its_fields(tokenizer, messages, merges):
    segments = lay_out_chat(tokenizer, messages, CONTEXTS)
    assert [m.strip() for m in merged(tokenizer, segments)] == [m.strip() for m in merges]
    plain = plain_messages(messages)
    whole = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert ids_of(segments) == tokenizer.encode(whole, add_special_tokens=False)
    everything = lay_out_chat(tokenizer, messages, Layout(ALL))
    assert ids_of(everything) == ids_of(segments)
    if not any("merge" in str(message) for message in messages):
        assert [segment.merge for segment in everything] == [True]


def test_without_a_template_a_conversation_is_its_paragraphs_and_a_text_is_a_message(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, user(f"{LONG}\n\nWhat?")]
    segments = lay_out_chat(tokenizer, messages, BARE)
    assert tokenizer.decode(ids_of(segments)) == f"Be brief.\n\n{LONG}\n\nWhat?"
    assert len(merged(tokenizer, segments)) == 1
    for text in ("Short?", LONG, f"{LONG}\n\nWhat?", "a <merge>b c d</merge> e"):
        alone = lay_out_chat(tokenizer, [user(text)], BARE)
        assert lay_out_text(tokenizer, text, CONTEXTS) == alone
        assert ids_of(lay_out_text(tokenizer, text, Layout(ALL))) == ids_of(alone)
    with pytest.raises(PromptError, match="tools: needs a chat template"):
        lay_out_chat(tokenizer, messages, BARE, {"tools": [{}]})


def test_a_message_that_is_none_is_named(tokenizer):
    for message, said in (
        (user("<raw>x"), "<raw> at line 1, column 1 is never closed"),
        (user("x", merge="yes"), "merge is 'yes', expected true or false"),
        (user(5), "content is 5, expected text or a list of parts"),
        (user([{"type": "image_url", "image_url": "x"}]), "content[0] is {'type': 'image_url'"),
    ):
        with pytest.raises(PromptError) as error:
            lay_out_chat(tokenizer, [message])
        assert re.split(r"[.:] ?", str(error.value), maxsplit=1)[0] == "messages[0]"
        assert said in str(error.value)


def test_what_a_model_or_a_tool_wrote_holds_no_tags(tokenizer):
    said = "use <raw> and </merge> for that"
    messages = [
        user("How?"),
        {"role": "assistant", "content": said},
        {"role": "tool", "content": [{"type": "text", "text": said}]},
        user("And <raw>then</raw>?"),
    ]
    segments = lay_out_chat(tokenizer, messages, CONTEXTS)
    assert tokenizer.decode(ids_of(segments)).count(said) == 2
    assert [m["content"] for m in plain_messages(messages)][1:] == [said, said, "And then?"]


def random_markup(random: Random, depth: int = 0) -> str:
    """Text with nested tags, literal tags among it."""
    pieces = []
    for _ in range(random.randint(1, 4)):
        kind = random.choice(("text", "text", "merge", "raw", "literal"))
        if kind == "text" or depth > 3:
            text = escape("".join(random.choices(WORDS, k=random.randint(1, 6))))
            # A backslash at its end would make text of the tag that follows.
            pieces.append(text + "." * text.endswith("\\"))
        elif kind == "literal":
            pieces.append(random.choice((r"\<raw>", r"\</merge>", r"\\\<merge>")))
        else:
            pieces.append(f"<{kind}>{random_markup(random, depth + 1)}</{kind}>")
    return "".join(pieces)


def test_random_tags_change_no_id_no_block_straddles_a_border_and_nothing_raw_merges(
    model_and_tokenizer,
):
    """Tokens may lie across a border: the fixture's tokenizer has one for two plus signs."""
    model, tokenizer = model_and_tokenizer
    for seed in range(100):
        source, bare = random_markup(Random(seed)), Layout(ALL, chat_template=False)
        spans = parse(source)
        owners = [n for n, span in enumerate(spans) for _ in span.text]
        found = tokenizer.backend_tokenizer.encode("".join(span.text for span in spans))
        for segments in (
            lay_out(tokenizer, source, None),
            lay_out_text(tokenizer, source, (CONTEXTS, Layout(ALL))[seed % 2]),
            lay_out_chat(tokenizer, [user(source)], (BARE, bare)[seed % 2]),
        ):
            assert ids_of(segments) == found.ids
            offsets, lengths = iter(found.offsets), []
            for segment in segments:
                touched = {n for _ in segment.ids for n in owners[slice(*next(offsets))]}
                if segment.merge:
                    assert all(spans[n].merge is not False for n in touched), source
                    assert len(touched) == 1 or all(spans[n].merge is None for n in touched), source
                step, size = 4 if segment.merge else 1, len(segment.ids)
                lengths += [min(step, size - start) for start in range(0, size, step)]
            assert compress(model, tokenizer, segments).lengths == lengths


def test_with_everything_raw_the_output_is_mlx_lms_with_the_same_lora(tmp_path):
    base, path = write_base(tmp_path / "base", qwen2_config()), tmp_path / "adapter"
    save_adapter(random_adapter(build(qwen2_config()), 4, head=False), path)
    ours, tokenizer = load(str(base), path)
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(path))
    plain, _ = mlx_lm.load(str(base))
    texts = (f"<raw>{LONG}</raw>", f"<merge><raw>{LONG}</raw></merge>", LONG)
    for text in texts:
        segments = lay_out(tokenizer, None, text)
        assert not any(segment.merge for segment in segments)
        ids = ids_of(segments)
        expected = theirs(mx.array([ids]))
        found = ours(mx.array([compress(ours, tokenizer, segments).ids]))
        assert mx.allclose(found, expected, atol=1e-4)
        assert not mx.allclose(plain(mx.array([ids])), expected, atol=1e-3)
        found = [r.token for r in stream_generate(ours, tokenizer, segments, 12)]
        host = mlx_lm.stream_generate(theirs, tokenizer, ids, 12)
        assert found == [r.token for r in host]


def test_a_context_of_as_many_tokens_as_the_threshold_merges(tokenizer):
    context = f"{LONG}\n\n"
    size = len(tokenizer.encode(context, add_special_tokens=False))
    for threshold, merges in ((size, True), (size + 1, False)):
        segments = lay_out_chat(tokenizer, [user(context + "Why?")], Layout("contexts", threshold))
        assert bool(merged(tokenizer, segments)) == merges


@pytest.mark.parametrize("text", ["a    b\n      c", "one <raw>  two  </raw>  three ", "   a"])
def test_spaces_belong_to_their_tokens_where_a_tokenizer_trims_their_offsets(text):
    """GPT-NeoX's post-processor; the oracle is the same tokenizer without it."""
    inner = json.loads((UPSTREAM / "base" / "tokenizer.json").read_text())

    def laid_out(trim):
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim}
        inner["post_processor"] = byte_level | {"use_regex": True}
        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(inner)))
        tokenizer = TokenizerWrapper(fast)
        return lay_out(tokenizer, f"<merge>{text}</merge>", "Why?")

    assert laid_out(True) == laid_out(False)
    if "<raw>" not in text:
        assert [segment.merge for segment in laid_out(True)] == [True, False]
