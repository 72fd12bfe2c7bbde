"""A thousand requests drawn from the API's schema, most of them wrong somewhere: never a 5xx."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.cli_runner import CHATML, copy_base
from tests.servers import serving

TEXTS = [
    "",
    "x",
    "AB CD EF GH",
    "\x00",
    "\ud800",
    "<merge>a</merge>",
    "<raw>",
    "\\<raw>",
    "é\u200b" * 9,
]
NUMBERS = [0, 1, -1, 0.5, 1.0, 2, 1e-30, 1e30, 1e308, 10**30, -0.0, 700, 699, 2**63, True]
ANYTHING = [None, [], {}, "x", 1, 1.5, True, [[]], {"a": {}}, [None], "1", [1, 2], ["x"]]
FIELDS: dict[str, list[Any]] = {
    "model": ["default_model", "base", "/etc", "", 5],
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "top_k": NUMBERS,
    "min_p": NUMBERS,
    "repetition_penalty": NUMBERS,
    "repetition_context_size": NUMBERS,
    "presence_penalty": NUMBERS,
    "presence_context_size": NUMBERS,
    "frequency_penalty": NUMBERS,
    "frequency_context_size": NUMBERS,
    "xtc_probability": NUMBERS,
    "xtc_threshold": NUMBERS,
    "seed": NUMBERS,
    "logit_bias": [{}, {"1": 5}, {"699": -100}, {"700": 1}, {"x": 1}, {"1": "x"}, {"01": 2}],
    "logprobs": [True, False, 0, 3, 12, -1],
    "top_logprobs": [0, 5, 11, 12, -1, 2.5],
    "stop": ["x", "", ["a", "b"], [""], ["\n"] * 16, ["\n"] * 17, [5], "x" * 300],
    "stream": [True, False, 1],
    "stream_options": [{}, {"include_usage": True}, {"include_usage": 1}],
    "n": [1, 2, 0],
    "echo": [False, True],
    "best_of": [1, 3],
    "suffix": ["x"],
    "user": ["me", 5],
    "response_format": [{"type": "text"}, {"type": "json_object"}, {}],
    "tools": [[], [{"type": "function", "function": {"name": "f"}}], ["x"]],
    "tool_choice": ["auto", "none", "required", {"type": "function"}],
    "chat_template_kwargs": [{}, {"think": False}, {"tokenize": True}, {"chat_template": "x"}],
    "adapters": ["/tmp"],
    "draft_model": ["x"],
    "merge": [True, False, "x"],
    "role_mapping": [{}],
}


def message(rng: random.Random) -> Any:
    if rng.random() < 0.05:
        return rng.choice(ANYTHING)
    made: dict[str, Any] = {"role": rng.choice([*("user", "system") * 4, "assistant", "tool", 5])}
    parts = [
        {"type": rng.choice(["text", "text", "image_url"]), "text": rng.choice([*TEXTS, 5])}
        for _ in range(rng.randint(0, 3))
    ]
    good = ["AB CD " * 40, "x", [{"type": "text", "text": "AB CD", "merge": True}]]
    made["content"] = rng.choice([*good, *good, rng.choice(TEXTS), parts, rng.choice(ANYTHING)])
    if rng.random() < 0.2:
        made["merge"] = rng.choice([True, False, "yes"])
    if rng.random() < 0.1:
        call = {"type": "function", "function": {"name": "f", "arguments": rng.choice(TEXTS)}}
        made["tool_calls"] = rng.choice([[call], [5], {}, [{"function": 5}]])
    return made


def request(rng: random.Random) -> tuple[str, bytes]:
    """A path, and a body that is right or wrong."""
    chat = rng.random() < 0.5
    body: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 3] * 12 + [0, -1, "1", 1.5, None])}
    if chat:
        body["messages"] = [message(rng) for _ in range(rng.randint(0, 4))]
    else:
        ids = [rng.randint(0, 699) for _ in range(rng.randint(0, 60))]
        good = ["AB CD", ids or "x", [ids or [1]], "<merge>AB CD EF</merge> GH"]
        body["prompt"] = rng.choice([*good, *good, rng.choice(TEXTS), rng.choice(ANYTHING)])
    for name in rng.sample(list(FIELDS), rng.choice([0, 0, 1, 1, 1, 2, 3, 6])):
        body[name] = rng.choice(ANYTHING if rng.random() < 0.15 else FIELDS[name])
    if body["max_tokens"] is None:
        body["max_completion_tokens"] = 1
    raw = json.dumps(body).encode()
    if rng.random() < 0.03:
        raw = raw[: rng.randrange(len(raw))]
    return "/v1/chat/completions" if chat else "/v1/completions", raw


def test_a_thousand_requests_of_the_schema_get_no_5xx(base_path, adapter_path, tmp_path):
    base = copy_base(base_path, tmp_path / "base", CHATML)
    rng = random.Random(2604)
    requests = [request(rng) for _ in range(1000)]
    with serving(base, adapter_path, chat_template=True, max_queue=1000) as server:

        def send(made: tuple[str, bytes]) -> int:
            answer = server.request("POST", *made)
            assert answer.status < 500, (answer.body, made)
            if answer.status >= 400:
                assert answer.error["message"]
            else:
                assert b'"error"' not in answer.body, (answer.body, made)
            return answer.status

        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(send, requests))
        server.assert_alive()
    assert set(statuses) == {200, 400, 404}
    assert statuses.count(200) > 200
