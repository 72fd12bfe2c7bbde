"""/v1/layout says what the same request would read: the counts are usage's, the text is whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kmerge_mlx import load
from kmerge_mlx.base import read_config, read_tokenizer
from kmerge_mlx.generation.cost import time_reading
from kmerge_mlx.generation.stream import compress
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.serving.layout import Layouts
from tests.convert.test_window import convert_window
from tests.servers import Address, eventually, serving
from tests.tiny import UPSTREAM
from tests.vocabularies import ENDS, MAKERS, base_with

ROOT = Path(__file__).parents[2]
TEXT = "Tree: JN\n+WO\n++UP, Task: Parent/Child Relationship, Parent: JN, Child: WO, Answer: "
BYTES = "caf\u00e9 \u65e5\u672c\u8a9e \U0001f389 end"
PARTS = [{"type": "text", "text": TEXT, "merge": True}, {"type": "text", "text": "\n\nIs it?"}]
BODIES: list[dict[str, Any]] = [
    {"prompt": TEXT},
    {"prompt": TEXT, "merge": False},
    {"prompt": "a <merge>b c d e f g</merge> h"},
    {"prompt": [7, 8, 9, 10, 11]},
    *({"messages": [{"role": "user", "content": c}]} for c in (TEXT, f"<raw>{TEXT}</raw>x", PARTS)),
    {"messages": [{"role": "user", "content": PARTS}], "merge": False},
    {"messages": [{"role": "user", "content": PARTS}], "merge": True},
]


@pytest.fixture(scope="module")
def server(base_path, adapter_path):
    with serving(base_path, adapter_path, merges="documents") as address:
        yield address


def layout(server: Address, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.request("POST", "/v1/layout", body)
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/json"
    return answer.json


def path_of(body: Any) -> str:
    return "/v1/chat/completions" if "messages" in str(body) else "/v1/completions"


@pytest.mark.parametrize("body", BODIES)
def test_its_counts_are_those_of_the_same_request_answered(server, body):
    found = layout(server, body)
    usage = server.request("POST", path_of(body), body | {"max_tokens": 1}).json["usage"]
    for name in ("prompt_tokens", "compressed_tokens", "merged_tokens", "raw_tokens"):
        assert found[name] == usage[name]
    assert found["compression_ratio"] == usage["prompt_tokens"] / usage["compressed_tokens"]
    blocks = [block for segment in found["segments"] for block in segment["blocks"]]
    assert len(blocks) == usage["compressed_tokens"]
    assert sum(map(len, blocks)) == usage["prompt_tokens"]
    merged = [block for s in found["segments"] if s["merge"] for block in s["blocks"]]
    assert sum(map(len, merged)) == usage["merged_tokens"]
    assert max(map(len, merged), default=0) <= found["merge_factor"] == 4


def test_merge_beside_the_messages_decides_for_all_of_a_conversation(server):
    tagged = f"<merge>{TEXT}</merge> and <raw>this</raw>"
    for content in (TEXT, tagged, PARTS):
        body = {"messages": [{"role": "user", "content": content}]}
        texts = {}
        for merge in (None, True, False):
            found = layout(server, body | {"merge": merge})
            blocks = [block for segment in found["segments"] for block in segment["blocks"]]
            texts[merge] = "".join(token for block in blocks for token in block)
            if merge is not None:
                assert [s["merge"] for s in found["segments"]] == [merge]
        assert texts[None] == texts[True] == texts[False]


@pytest.mark.parametrize("name", MAKERS)
def test_the_texts_of_all_tokens_are_the_text_and_a_split_character_is_in_its_last_token(
    tmp_path, name
):
    path = base_with(tmp_path / "base", MAKERS[name](), 720, ENDS[name])
    tokenizer = read_tokenizer(path, read_config(path), "base")
    ids = list(tokenizer.encode(BYTES, add_special_tokens=False))
    (segment,) = Layouts(tokenizer, int).describe([Segment(ids)], 4)["segments"]
    texts = [text for block in segment["blocks"] for text in block]
    assert "".join(texts).strip(" ") == BYTES == tokenizer.decode(ids)
    parts = [tokenizer.detokenizer.spell(i)[1] for i in ids]
    for text, place in zip(texts, range(1, len(ids) + 1), strict=True):
        before = b"".join(parts[: place - 1]).decode(errors="ignore")
        assert before + text == b"".join(parts[:place]).decode(errors="ignore")


def test_a_character_that_its_segment_does_not_end_is_marked(tmp_path):
    path = base_with(tmp_path / "base", MAKERS["byte level"](), 720, ENDS["byte level"])
    tokenizer = read_tokenizer(path, read_config(path), "base")
    first = tokenizer.encode("\U0001f389", add_special_tokens=False)[:1]
    (segment,) = Layouts(tokenizer, int).describe([Segment(first)], 4)["segments"]
    assert segment["blocks"] == [["\ufffd"]]


def test_an_encoder_with_a_tokenizer_of_its_own_spells_what_merges(tmp_path):
    made = tmp_path / "lclm"
    convert_window(UPSTREAM.parent / "lclm_cs4_w16" / "checkpoint", "it", made)
    with serving(made, made) as server:
        found = layout(server, {"prompt": f"<merge>{TEXT}</merge>\n\nIs it?"})
    texts = [("".join(t for b in s["blocks"] for t in b), s["merge"]) for s in found["segments"]]
    assert (TEXT, True) in texts
    assert [text for text, merge in texts if not merge][-1].endswith("Is it?")


QUANTIZED = {"kv_bits": 8, "kv_group_size": 32}


@pytest.mark.parametrize("start", [None, 0, 30, 10_000])
def test_kv_bytes_are_of_a_cache_that_has_read_the_prompt(start):
    options = {} if start is None else QUANTIZED | {"quantized_kv_start": start}
    with serving("bundled", "bundled", 4, **options) as server:
        found = [layout(server, {"prompt": TEXT, "merge": merge}) for merge in (True, False)]
    model, tokenizer = load("bundled", "bundled", 4)
    for merge, one in zip((True, False), found, strict=True):
        segments = [Segment(list(tokenizer.encode(TEXT)), merge)]
        reading = time_reading(model, lambda s=segments: compress(model, tokenizer, s), **options)
        assert (reading.positions, reading.kv_bytes) == (one["compressed_tokens"], one["kv_bytes"])


def test_the_example_of_the_docs_is_what_the_bundled_model_gets():
    text = (ROOT / "docs" / "serving.md").read_text()
    (body,) = re.findall(r"v1/layout -d '(.*?)'", text)
    (answer,) = re.findall(r'^{"object": "prompt.layout".*?\]}$', text, re.DOTALL | re.MULTILINE)
    with serving("bundled", "bundled", 4) as server:
        assert layout(server, json.loads(body)) == json.loads(answer)


def test_without_an_adapter_nothing_merges(base_path):
    with serving(base_path, None, k=1) as server:
        found = layout(server, {"prompt": f"<merge>{TEXT}</merge>"})
    assert [s["merge"] for s in found["segments"]] == [False]
    assert found["compressed_tokens"] == found["prompt_tokens"] == found["raw_tokens"]
    assert found["merge_factor"] == found["compression_ratio"] == 1


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"[]", {}, {"prompt": ""}, {"prompt": TEXT, "model": "other"}),
        *({"prompt": "<merge>x"}, {"prompt": [700]}, {"prompt": "x", "suffix": "y"}),
        {"prompt": "word " * 9000},
        {"prompt": "x" * 400_000},
        {"messages": []},
        {"messages": [{"role": "king", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}], "merge": "yes"},
        {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
    ],
)
def test_what_a_completion_refuses_it_refuses_in_the_same_words(server, body):
    asked, answered = (server.request("POST", p, body) for p in ("/v1/layout", path_of(body)))
    assert (asked.status, asked.error) == (answered.status, answered.error)
    assert asked.status in (400, 404)
    server.assert_alive()


def test_it_is_of_one_prompt_and_within_the_limits_of_any_request(server, base_path, adapter_path):
    refused = server.request("POST", "/v1/layout", {"prompt": ["a", "b"]})
    assert (refused.status, refused.error["param"]) == (400, "prompt")
    assert server.request("GET", "/v1/layout").status == 405
    with serving(base_path, adapter_path, max_body_bytes=100, drain_timeout=0) as small:
        assert small.request("POST", "/v1/layout", {"prompt": "x" * 200}).status == 413
        small.server.service.drain(0)
        refused = small.request("POST", "/v1/layout", {"prompt": "x"})
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert small.server.service.in_flight == 0
    eventually(lambda: server.metric("requests_in_flight") == 0)


def test_the_page_is_open_and_what_it_asks_needs_the_key(base_path, adapter_path, tmp_path):
    key = tmp_path / "key"
    key.write_text("sesame-42")
    with serving(base_path, adapter_path, api_key=str(key)) as server:
        page, head = (server.request(method, "/") for method in ("GET", "HEAD"))
        assert (page.status, head.status, head.body) == (200, 200, b"")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert b"sesame" not in page.body
        assert server.request("POST", "/v1/layout", {"prompt": "x"}).status == 401
        own = {"Authorization": "Bearer sesame-42"}
        assert server.request("POST", "/v1/layout", {"prompt": "x"}, own).status == 200


def test_the_servers_own_page_may_call_and_a_page_of_another_port_or_name_may_not(
    base_path, adapter_path
):
    def status(server: Address, origin: str, host: str) -> int:
        headers = {"Origin": origin, "Host": host}
        return server.request("POST", "/v1/layout", {"prompt": "x"}, headers).status

    with serving(base_path, adapter_path, allowed_hosts=["llm.example"]) as server:
        own, port = f"localhost:{server.port}", server.port
        for origin, host, expected in (
            *((f"http://{own}", own, 200), (f"http://127.0.0.1:{port}", f"127.0.0.1:{port}", 200)),
            *(("https://llm.example", "llm.example", 200), ("http://[::1]:1", "[::1]:1", 200)),
            *((f"http://localhost:{port + 1}", own, 403), (f"http://127.0.0.1:{port}", own, 403)),
            *(("null", own, 403), ("http://", own, 403), ("http://evil.example", own, 403)),
            ("http://evil.example", "evil.example", 403),
        ):
            assert status(server, origin, host) == expected, (origin, host)
    # Any name is served then, so a name that leads here by DNS rebinding proves nothing.
    with serving(base_path, adapter_path, allowed_hosts=["*"]) as server:
        assert status(server, "http://evil.example", "evil.example") == 403
        assert status(server, "http://localhost:1", "localhost:1") == 200
