"""Asks a server thousands of times and looks whether an answer, a request or memory gets lost.

    python benchmarks/serve_soak.py --requests 2000 --json soak.json

Prompts share prefixes or are fresh, are merged or raw, streamed or not; some clients leave in the
middle. Every answer that is read to its end is compared with the one that the library gave alone,
before the server started. Memory is the server's resident set after every tenth of the requests;
its growth is that of the highest of the second half over the highest of the first.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from measure import resident, start_server, stop_server
from openai import OpenAI

TOLERANCE = 1e-3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--adapter-path", default="bundled")
    parser.add_argument("--k", default="4")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--different", type=int, default=200, help="different prompts")
    parser.add_argument("--longest", type=int, default=400, help="tokens of the longest prompt")
    parser.add_argument("--max-blocks", type=int, default=4096)
    parser.add_argument("--leave", type=float, default=0.15, help="how many clients leave early")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here too")
    return parser.parse_args()


def make_prompts(given: argparse.Namespace, vocab_size: int) -> list[dict[str, Any]]:
    """Different requests, half of them with one of a few long beginnings."""
    rng = random.Random(given.seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(1, vocab_size) for _ in range(count)]

    documents = [ids(given.longest // 2) for _ in range(5)]
    made = []
    for i in range(given.different):
        start = rng.choice(documents) if i % 2 else []
        prompt = start + ids(rng.randint(4, given.longest // 2))
        body = {"prompt": prompt, "max_tokens": rng.randint(1, 24), "logprobs": 0}
        body["extra_body"] = {"merge": rng.random() < 0.8}
        if i % 4 == 0:
            body["extra_body"]["repetition_penalty"] = 1.2
        made.append(body)
    return made


def references(given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """The prompts, and the log-probabilities of their answers, one at a time without a server."""
    from mlx_lm.sample_utils import make_logits_processors

    from kmerge_mlx import Segment, load, stream_generate
    from kmerge_mlx.model import merged_embedding

    model, tokenizer = load(given.model, given.adapter_path, int(given.k))
    prompts = make_prompts(given, merged_embedding(model).vocab_size)
    expected = []
    for body in prompts:
        penalty = body["extra_body"].get("repetition_penalty")
        processors = make_logits_processors(repetition_penalty=penalty)
        segment = Segment(body["prompt"], body["extra_body"]["merge"])
        responses = stream_generate(
            model, tokenizer, [segment], body["max_tokens"], logits_processors=processors
        )
        expected.append([r.logprobs[r.token].item() for r in responses])
    return prompts, expected


def ask(
    client: OpenAI, body: dict[str, Any], expected: list[float], stream: bool, leave: bool
) -> str:
    """Asks once; returns what became of it."""
    try:
        answer = client.completions.create(model="default_model", stream=stream, **body)
        got: list[float] = []
        for piece in answer if stream else [answer]:
            if stream and leave:
                answer.close()
                return "left"
            got += piece.choices[0].logprobs.token_logprobs
    except Exception as error:
        return f"lost: {type(error).__name__}"
    near = len(got) == len(expected) and all(
        abs(a - b) < TOLERANCE for a, b in zip(got, expected, strict=True)
    )
    return "right" if near else "wrong"


def metric(url: str, name: str) -> float:
    text = urlopen(url.removesuffix("/v1") + "/metrics").read().decode()
    return float(re.search(rf"^kmerge_mlx_{name} (\S+)$", text, re.MULTILINE)[1])


def tenth(
    number: int, given: argparse.Namespace, url: str, prompts: list[Any], expected: list[Any]
) -> Counter[str]:
    """A tenth of the requests, many at a time."""
    client = OpenAI(base_url=url, api_key="none", max_retries=3, timeout=300)

    def one(i: int) -> str:
        rng = random.Random(f"{given.seed} {number} {i}")
        which = rng.randrange(len(prompts))
        if rng.random() < given.leave / 2:  # before an answer comes
            body = prompts[which] | {"max_tokens": 500}
            hurried = client.with_options(timeout=rng.uniform(0.01, 0.2), max_retries=0)
            outcome = ask(hurried, body, [], rng.random() < 0.5, leave=False)
            if "Timeout" in outcome:
                return "left"
            return outcome if outcome.startswith("lost") else "answered before it left"
        leave = rng.random() < given.leave / 2  # in mid-stream
        return ask(client, prompts[which], expected[which], leave or rng.random() < 0.5, leave)

    with ThreadPoolExecutor(given.clients) as pool:
        return Counter(pool.map(one, range(given.requests // 10)))


def main() -> None:
    given = arguments()
    prompts, expected = references(given)
    line = ["kmerge_mlx", "serve", "--model", given.model, "--adapter-path", given.adapter_path]
    line += ["--k", given.k, "--max-blocks", str(given.max_blocks)]
    server, url = start_server(line)
    result: dict[str, Any] = {"outcomes": Counter(), "resident_mb": [], "slots": []}
    begin = time.monotonic()
    try:
        for number in range(10):
            result["outcomes"] += tenth(number, given, url, prompts, expected)
            result["resident_mb"].append(resident(server.pid) / 2**20)
            result["slots"].append(metric(url, "block_slots_in_use"))
        result["in_flight_at_the_end"] = metric(url, "requests_in_flight")
    finally:
        result["exit_code"] = stop_server(server)
    result["seconds"] = round(time.monotonic() - begin, 1)
    memory = result["resident_mb"]
    result["memory_growth"] = max(memory[5:]) / max(memory[:5]) - 1
    outcomes = result["outcomes"]
    bad = [name for name in outcomes if name.startswith(("wrong", "lost"))]
    result["good"] = (
        not bad
        and result["memory_growth"] < 0.05
        and max(result["slots"]) <= given.max_blocks
        and result["exit_code"] == 0
    )
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    raise SystemExit(not result["good"])


if __name__ == "__main__":
    main()
