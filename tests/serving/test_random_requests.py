"""Random requests to a live server: none ends it, and every answer is the text of its tokens.

`pytest --hypothesis-profile thorough tests/serving/test_random_requests.py` sends 10,000 of them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.server import Response
from tokenizers import Tokenizer

from kmerge_mlx.serving import service
from kmerge_mlx.serving.answers import Answer
from kmerge_mlx.serving.requests import Completion
from tests.cli_runner import CHATML, copy_base
from tests.servers import Address, serving
from tests.serving.test_requests import UNSUPPORTED
from tests.serving.test_text import until_stop
from tests.vocabularies import base_with, byte_level, sentencepiece, tekken

VOCABULARY = 710
AT_ONCE = 8
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"


# What is asked

UNICODE = st.text(max_size=60)
WORDS = st.sampled_from(
    ["AB CD EF", "the tree \u00e9 ", "<merge>AB CD</merge> x", "<raw>", "\n", "\\"]
)
TEXTS = st.one_of(WORDS.map(lambda text: text * 9), WORDS, UNICODE)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | UNICODE
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(UNICODE, inner, max_size=3),
    max_leaves=6,
)
KEYWORDS = st.sampled_from(["type", "properties", "items", "$ref", "enum", "anyOf", "required"])
SCHEMAS = st.dictionaries(KEYWORDS | UNICODE, ANYTHING, max_size=4)
IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)
PROMPTS = TEXTS | IDS | st.lists(TEXTS | IDS, max_size=3)
SHORT = st.integers(1, 4)
# Texts whose tokens an answer is mixed from: parts of characters, spaces, and pieces of stop texts.
MIXED = st.sampled_from(["\u65e5", "\U0001f600", "a\u00e9", " t the", "ea e", "\n\n a"])
STOPS = st.sampled_from(["\u65e5", "ee", "e a", "a\u00e9", " t", "\n\n", "aa", "\U0001f600 "])
SHARE, PENALTY = st.floats(0, 1), st.floats(-2, 2)


def some(**values: Any) -> Any:
    """An object with some of these entries."""
    return st.fixed_dictionaries({}, optional=values)


FUNCTION = some(name=UNICODE, description=UNICODE, parameters=SCHEMAS, arguments=ANYTHING)
CALL = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION})
ANSWER_FORMAT = some(type=st.sampled_from(["text", "json_object", "json_schema"]), schema=SCHEMAS)
TEMPLATE_OPTIONS = st.sampled_from(
    [
        *("think", "tools", "messages", "documents", "tokenize", "return_dict", "return_tensors"),
        *("padding", "max_length", "add_generation_prompt", "continue_final_message", "tokenizer"),
        *("conversation", "chat_template", "bos_token", "date_string", "raise_exception"),
    ]
)
FIELDS: dict[str, Any] = {
    "model": st.sampled_from(["base", "default_model", "/etc", "", "..", None]),
    "max_completion_tokens": SHORT,
    "temperature": st.floats(0, 2),
    "top_p": SHARE,
    "min_p": SHARE,
    "top_k": st.integers(0, VOCABULARY - 1),
    "seed": st.integers(-1, 2**64 - 1),
    "repetition_penalty": st.floats(0.01, 3),
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "repetition_context_size": st.integers(1, 2**31 - 1),
    "frequency_context_size": SHORT,
    "xtc_probability": SHARE,
    "xtc_threshold": st.floats(0, 0.5),
    "logit_bias": st.dictionaries(
        st.integers(0, VOCABULARY - 1).map(str), st.floats(-100, 100), max_size=4
    ),
    "logprobs": st.booleans() | st.integers(0, 20),
    "top_logprobs": st.integers(0, 20),
    "stop": st.lists(STOPS, max_size=3) | UNICODE,
    "stream": st.booleans(),
    "stream_options": some(include_usage=st.booleans()),
    "tools": st.lists(CALL, max_size=2),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "chat_template_kwargs": st.dictionaries(TEMPLATE_OPTIONS | UNICODE, ANYTHING, max_size=2),
    "merge": st.booleans(),
    "response_format": ANSWER_FORMAT,
    **{name: st.just(value) for name, value in UNSUPPORTED.items()},
}
PARTS = st.lists(
    some(type=st.sampled_from(["text", "text", "image_url"]), text=TEXTS, merge=st.booleans()),
    max_size=3,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "system", "assistant", "tool", "developer"])},
    optional={
        "content": st.one_of(TEXTS, TEXTS, PARTS, ANYTHING),
        "merge": st.none() | st.booleans(),
        "tool_calls": st.lists(CALL | ANYTHING, max_size=2),
        "name": UNICODE,
    },
)
QUESTION = st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS})
NAMES = st.lists(st.sampled_from(list(FIELDS)[:25]), max_size=5) | st.lists(
    st.sampled_from(list(FIELDS)), max_size=2
)


@dataclass
class Asked:
    """A request; ``mixed`` in its body is a text, whose tokens it favours in any tokenizer."""

    path: str
    body: dict[str, Any]
    cut: int | None  # where its bytes end

    def raw(self, tokenizer: Tokenizer) -> bytes:
        """The bytes to send."""
        body = dict(self.body)
        if text := body.pop("mixed", None):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            body["logit_bias"] = {str(token): 50 for token in ids}
        return json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass")[: self.cut]


@st.composite
def request(draw: Any) -> Asked:
    """A body that is right, or wrong in a place or two."""
    chat = draw(st.booleans())
    body: dict[str, Any] = {name: draw(FIELDS[name]) for name in draw(NAMES)}
    if chat:
        body["messages"] = draw(st.lists(QUESTION, min_size=1, max_size=3) | st.lists(MESSAGE))
    else:
        body["prompt"] = draw(st.one_of(PROMPTS, PROMPTS, PROMPTS, ANYTHING))
    body["max_tokens"] = draw(SHORT)
    if draw(st.booleans()):
        mixed = {"temperature": 1, "max_tokens": draw(st.integers(4, 12)), "mixed": draw(MIXED)}
        body |= mixed | ({"stop": draw(st.lists(STOPS, max_size=2))} if draw(st.booleans()) else {})
    if draw(st.integers(0, 9)) == 9:
        # A wrong number of tokens may be very long, and "mixed" is no field of a request.
        wrong = [name for name in body if "tokens" not in name and name != "mixed"]
        body[draw(st.sampled_from(wrong) | UNICODE)] = draw(ANYTHING)
    cut = draw(st.integers(0, 400)) if draw(st.integers(0, 49)) == 49 else None
    return Asked("/v1/chat/completions" if chat else "/v1/completions", body, cut)


# What is answered


class Recorded(Answer):
    """An answer that keeps its tokens."""

    all: ClassVar[list[Recorded]] = []

    def __init__(self, completion: Completion, *more: Any):
        super().__init__(completion, *more)
        self.stops, self.ids, self.ends = tuple(completion.stop), [], []
        self.all.append(self)

    def add(self, response: Response, more: bool = True) -> None:
        self.ids.append(response.token)
        self.ends.append(response.finish_reason)
        super().add(response, more)

    def expected(self, oracle: Tokenizer, eos: int) -> str:
        """What a client should get."""
        ended = self.ends[-1] == "stop" and self.ids[-1] == eos
        ids = self.ids[:-1] if ended else self.ids
        return until_stop(oracle.decode(ids, skip_special_tokens=False), self.stops)[0]


def texts_of(body: bytes) -> list[str]:
    """The texts of an answer, streamed or not."""
    pieces = [body.decode()]
    if not body.startswith(b"{"):
        lines = pieces[0].split("\n\n")
        pieces = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert pieces.pop() == "[DONE]", body
    texts: dict[int, str] = defaultdict(str)
    for piece in pieces:
        for choice in json.loads(piece)["choices"]:  # an error in a stream has none
            part = choice.get("delta") or choice.get("message") or choice
            texts[choice["index"]] += part.get("content") or part.get("text") or ""
    return list(texts.values())


@dataclass
class Live:
    """A server, and a decoder that is not its own."""

    address: Address
    oracle: Tokenizer
    eos: int
    statuses: Counter[int] = field(default_factory=Counter)

    def ask(self, asked: list[Asked]) -> None:
        """Sends requests at once, and checks their answers."""
        Recorded.all.clear()
        with ThreadPoolExecutor(len(asked)) as pool:
            sent = [(one.path, one.raw(self.oracle)) for one in asked]
            answers = list(pool.map(lambda one: self.address.request("POST", *one), sent))
        texts = []
        for answer in answers:
            assert answer.status in (200, 400, 404), answer.body
            self.statuses[answer.status] += 1
            if answer.status == 200:
                texts += texts_of(answer.body)
            else:
                assert answer.error["message"]
        assert sorted(texts) == sorted(one.expected(self.oracle, self.eos) for one in Recorded.all)


@pytest.fixture(scope="module", params=["byte level", "sentencepiece", "tekken"])
def live(request, base_path, adapter_path, tmp_path_factory):
    folder, template = tmp_path_factory.mktemp("live") / "base", TOOLS + CHATML
    made, eos, adapter = byte_level(), "<|endoftext|>", None
    if request.param == "byte level":
        copy_base(base_path, folder, template)
        adapter = adapter_path
    else:  # their tables have rows without a token
        used = tekken()
        if request.param == "sentencepiece":
            used, made, eos = sentencepiece(), sentencepiece(), "</s>"
        base_with(folder, used, VOCABULARY, eos)
        (folder / "chat_template.jinja").write_text(template)
    with (
        mock.patch.object(service, "Answer", Recorded),
        serving(folder, adapter, chat_template=True, max_queue=1000) as address,
    ):
        found = Live(address, made, made.token_to_id(eos))
        yield found
        address.assert_alive()
    assert found.statuses[200] > sum(found.statuses.values()) / 5


@pytest.mark.slow
@settings(
    deadline=None,
    max_examples=settings().max_examples // 5,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(asked=st.lists(request(), min_size=AT_ONCE, max_size=AT_ONCE))
def test_no_request_ends_the_server_and_every_text_is_that_of_its_tokens(live, asked):
    live.ask(asked)
