"""Asks a server thousands of times and looks whether an answer, a request or memory gets lost.

    python benchmarks/serve_soak.py --requests 2000 --json soak.json
    python benchmarks/serve_soak.py --requests 300 --prompt-cache-dir DIR --restarts 3

Prompts share prefixes or are fresh, are merged or raw, streamed or not; some clients leave in the
middle. Every answer that is read to its end is compared with the one that the library gave alone,
before the server started. Memory is the server's resident set after every tenth of the requests;
its growth is that of the highest of the second half over the highest of the first.

With --restarts the server is killed (SIGKILL) that often in the midst of requests, and started
again; what was cut off is asked again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
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
    parser.add_argument("--prompt-cache-dir", help="the server's folder of prompt caches")
    parser.add_argument("--prompt-cache-dir-bytes", default="20MB")
    parser.add_argument("--restarts", type=int, default=0, help="times that the server is killed")
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
    """A metric's value, 0 if it was never counted."""
    text = urlopen(url.removesuffix("/v1") + "/metrics").read().decode()
    found = re.search(rf"^kmerge_mlx_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


class Running:
    """The server, which may be killed and started again while it is asked."""

    def __init__(self, line: list[str]):
        self._line, self.starts, self.answered, self.down = line, 1, 0, False
        self.process, self.url = start_server(line)

    def restart(self, after: int) -> None:
        """Kills the server once it has answered so many requests, and starts it again."""
        while self.answered < after:
            time.sleep(0.01)
        self.down = True
        self.process.kill()
        self.process.wait()
        self.process, self.url = start_server(self._line)
        self.starts, self.down = self.starts + 1, False

    def asked(self, ask_once: Callable[[OpenAI], str]) -> str:
        """Asks, and asks again if the server was killed meanwhile."""
        while True:
            starts = self.starts
            client = OpenAI(base_url=self.url, api_key="none", max_retries=3, timeout=300)
            outcome = ask_once(client)
            cut_off = self.down or starts != self.starts
            if not (cut_off and outcome.startswith("lost")):
                self.answered += 1
                return outcome
            time.sleep(0.2)


def tenth(
    number: int,
    given: argparse.Namespace,
    running: Running,
    prompts: list[Any],
    expected: list[Any],
    kill: bool,
) -> Counter[str]:
    """A tenth of the requests, many at a time; in their midst the server may be killed."""
    requests = given.requests // 10

    def one(i: int) -> str:
        rng = random.Random(f"{given.seed} {number} {i}")
        which = rng.randrange(len(prompts))
        if rng.random() < given.leave / 2:  # before an answer comes
            body = prompts[which] | {"max_tokens": 500}
            timeout, stream = rng.uniform(0.01, 0.2), rng.random() < 0.5

            def hurried(client: OpenAI) -> str:
                client = client.with_options(timeout=timeout, max_retries=0)
                outcome = ask(client, body, [], stream, leave=False)
                if "Timeout" in outcome:
                    return "left"
                return outcome if outcome.startswith("lost") else "answered before it left"

            return running.asked(hurried)
        leave = rng.random() < given.leave / 2  # in mid-stream
        how = prompts[which], expected[which], leave or rng.random() < 0.5, leave
        return running.asked(lambda client: ask(client, *how))

    with ThreadPoolExecutor(given.clients + 1) as pool:
        killed = pool.submit(running.restart, running.answered + requests // 2) if kill else None
        outcomes = Counter(pool.map(one, range(requests)))
        if killed is not None:
            killed.result()
        return outcomes


def main() -> None:
    given = arguments()
    prompts, expected = references(given)
    line = ["kmerge_mlx", "serve", "--model", given.model, "--adapter-path", given.adapter_path]
    line += ["--k", given.k, "--max-blocks", str(given.max_blocks)]
    if given.prompt_cache_dir is not None:
        line += ["--prompt-cache-dir", given.prompt_cache_dir]
        line += ["--prompt-cache-dir-bytes", given.prompt_cache_dir_bytes]
    running = Running(line)
    kills = {10 * (i + 1) // (given.restarts + 1) for i in range(given.restarts)}
    result: dict[str, Any] = {"outcomes": Counter(), "resident_mb": [], "slots": []}
    result |= {"files_read": [], "files_written": []}  # by the server that is there then
    begin = time.monotonic()
    try:
        for number in range(10):
            kill = number in kills
            result["outcomes"] += tenth(number, given, running, prompts, expected, kill)
            result["resident_mb"].append(resident(running.process.pid) / 2**20)
            result["slots"].append(metric(running.url, "block_slots_in_use"))
            for event in ("read", "written"):
                name = f'prompt_cache_files_total{{event="{event}"}}'
                result[f"files_{event}"].append(metric(running.url, name))
        result["in_flight_at_the_end"] = metric(running.url, "requests_in_flight")
    finally:
        result["exit_code"] = stop_server(running.process)
    result["restarts"] = running.starts - 1
    result["seconds"] = round(time.monotonic() - begin, 1)
    memory = result["resident_mb"]
    result["memory_growth"] = max(memory[5:]) / max(memory[:5]) - 1
    outcomes = result["outcomes"]
    bad = [name for name in outcomes if name.startswith(("wrong", "lost"))]
    result["good"] = (
        not bad
        and (given.restarts or result["memory_growth"] < 0.05)  # a new process has not grown yet
        and max(result["slots"]) <= given.max_blocks
        and result["exit_code"] == 0
        and result["restarts"] == given.restarts
    )
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    raise SystemExit(not result["good"])


if __name__ == "__main__":
    main()
