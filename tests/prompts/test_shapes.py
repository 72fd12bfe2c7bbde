"""Twelve shapes in which clients send a document and a question, and what of them merges.

The templates are the clients' own: llm 0.27 (``cli.py``), langchain 0.3 (``stuff_prompt``,
``rlm/rag-prompt``), llama-index 0.12 (``default_prompts``), Open WebUI 0.6 (``config.py``).
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kmerge_mlx.prompts.lay_out import lay_out_chat, lay_out_text
from kmerge_mlx.prompts.policy import CONTEXTS, DEFAULT_LAYOUT, Layout
from tests.cli_runner import CHATML
from tests.prompts.test_lay_out import ids_of, merged_text, user

DOCS = Path(__file__).parents[2] / "docs" / "prompts.md"
QUESTION = "Who repaired the blue lamp near the old mill, and when did they sell it?"
K = 4

STUFF = (
    "Use the following pieces of context to answer the question at the end. If you don't know the "
    "answer, just say that you don't know, don't try to make up an answer.\n\n{document}\n\n"
    "Question: {question}\nHelpful Answer:"
)
RAG_PROMPT = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved "
    "context to answer the question. If you don't know the answer, just say that you don't know. "
    "Use three sentences maximum and keep the answer concise.\nQuestion: {question} \n"
    "Context: {document} \nAnswer:"
)
STUFF_SYSTEM = (
    "Use the following pieces of context to answer the user's question. \nIf you don't know the "
    "answer, just say that you don't know, don't try to make up an answer.\n----------------\n"
    "{document}"
)
LLAMA_INDEX = (
    "Context information is below.\n---------------------\n{document}\n---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\n"
    "Query: {question}\nAnswer: "
)
OPEN_WEBUI = (
    "### Task:\nRespond to the user query using the provided context, incorporating inline "
    "citations in the format [id].\n\n<context>\n<source id=1>{document}</source>\n</context>\n\n"
    "{question}"
)


def sentences(count: int) -> str:
    """Prose of so many sentences."""
    rng = random.Random(count)
    who = ("The baker", "A sailor", "My neighbour", "The old teacher", "A young painter")
    does = ("carried", "described", "forgot", "repaired", "sold", "counted", "painted")
    what = ("three chairs", "a wooden boat", "some letters", "a long map", "two bells")
    where = ("by the river", "behind the station", "in the market", "on the hill", "at dawn")
    return " ".join(f"{' '.join(map(rng.choice, (who, does, what, where)))}." for _ in range(count))


DOCUMENT = "\n".join(sentences(count) for count in range(14, 24))


def asks(form: str) -> list[dict[str, Any]]:
    return [user(form.format(document=DOCUMENT, question=QUESTION))]


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content.format(document=DOCUMENT)}


PARTS = [{"type": "text", "text": DOCUMENT}, {"type": "text", "text": QUESTION}]
WEBUI_PARTS = [{"type": "text", "text": asks(OPEN_WEBUI)[0]["content"]}]
SHAPES = {
    "document, blank line, question": asks("{document}\n\n{question}"),
    "document, line end, question": asks("{document}\n{question}"),
    "question, blank line, document": asks("{question}\n\n{document}"),
    "question, document, question": asks("{question}\n\n{document}\n\n{question}"),
    "`cat file \\| llm question`": asks("{document}\n {question}"),
    "`cat file \\| llm -s question`": [system(QUESTION), user(DOCUMENT)],
    "two parts (AI SDK, pydantic-ai)": [user(PARTS)],
    "LangChain, stuff chain": asks(STUFF),
    "LangChain, rlm/rag-prompt": asks(RAG_PROMPT),
    "LangChain, documents in the system message": [system(STUFF_SYSTEM), user(QUESTION)],
    "LlamaIndex, text QA": asks(LLAMA_INDEX),
    "Open WebUI, RAG": [user(WEBUI_PARTS)],
}


@cache
def words_tokenizer() -> TokenizerWrapper:
    """A tokenizer with a token or two for a word, as large vocabularies have them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    texts = [part for m in SHAPES.values() for part in (str(m), QUESTION)]
    inner.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    return TokenizerWrapper(fast)


def positions(segments: Any) -> int:
    return sum(segment.positions(K) for segment in segments)


def row(name: str) -> str:
    """A line of the table in docs/prompts.md: tokens, and positions before and after."""
    tokenizer, messages = words_tokenizer(), SHAPES[name]
    before = lay_out_chat(tokenizer, messages, Layout(CONTEXTS))
    after = lay_out_chat(tokenizer, messages)
    sizes = (len(ids_of(after)), positions(before), positions(after))
    return f"| {name} | " + " | ".join(f"{size:,}" for size in sizes) + " |"


@pytest.mark.parametrize("name", SHAPES)
def test_what_people_send_merges_and_their_question_does_not(name):
    tokenizer, messages = words_tokenizer(), SHAPES[name]
    segments = lay_out_chat(tokenizer, messages)
    assert DEFAULT_LAYOUT.merges == "documents"
    assert ids_of(segments) == ids_of(lay_out_chat(tokenizer, messages, Layout(CONTEXTS)))
    found = merged_text(tokenizer, segments)
    assert all(words not in found for words in (QUESTION, "Answer", "don't know"))
    assert sentences(18) in found
    assert len(ids_of(segments)) / positions(segments) > 2.4
    assert row(name) in DOCS.read_text()


def test_an_earlier_question_is_laid_out_as_it_was_so_that_a_cache_still_fits():
    tokenizer, turn = words_tokenizer(), asks("{document}\n{question}")
    more = [*turn, {"role": "assistant", "content": "The baker."}, user("Why?")]
    first, second = (lay_out_chat(tokenizer, messages) for messages in (turn, more))
    assert second[: len(first) - 1] == first[:-1]
    assert second[len(first) - 1].ids[: len(first[-1].ids)] == first[-1].ids


@pytest.mark.parametrize(
    ("messages", "note"),
    [
        ([user(sentences(40))], "no line ends between a document and a question"),
        ([system(sentences(20)), user("Why?")], "system messages merge from 512 tokens on"),
        ([user(f"{DOCUMENT}\n{QUESTION}")], None),
        ([user("Why?")], None),
    ],
)
def test_why_a_long_text_does_not_merge_is_said(messages, note):
    tokenizer, said = words_tokenizer(), []
    segments = lay_out_chat(tokenizer, messages, note=lambda what, why: said.append((what, why)))
    role = messages[0]["role"]
    assert said == ([(f"messages[0] ({role})", note)] if note else [])
    assert bool(merged_text(tokenizer, segments)) == (note is None and len(messages[0]) > 10) or (
        DOCUMENT in messages[0]["content"]
    )


def test_a_text_is_read_as_a_message_and_two_long_ends_keep_the_last_paragraph_raw():
    tokenizer = words_tokenizer()
    text = f"{sentences(30)}\n\n{sentences(31)}\n\n{sentences(32)}"
    for merges in (DEFAULT_LAYOUT, Layout(CONTEXTS)):
        segments = lay_out_text(tokenizer, text, merges)
        assert sentences(31) in merged_text(tokenizer, segments)
        assert sentences(32) not in merged_text(tokenizer, segments)


def test_a_long_chat_is_tokenized_once(monkeypatch):
    tokenizer, sizes = words_tokenizer(), []
    kind = type(tokenizer._tokenizer)
    encode = kind._encode_plus

    def counting(self, text, *args, **options):
        sizes.append(len(text))
        return encode(self, text, *args, **options)

    monkeypatch.setattr(kind, "_encode_plus", counting)
    answer = {"role": "assistant", "content": DOCUMENT * 10}
    messages = [user(f"{DOCUMENT * 10}\n{QUESTION}"), answer, user("Why?")]
    for layout in (DEFAULT_LAYOUT, Layout(CONTEXTS)):
        sizes.clear()
        lay_out_chat(tokenizer, messages, layout)
        assert sum(sizes) < 1.1 * sum(len(message["content"]) for message in messages)
