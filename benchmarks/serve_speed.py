"""Requests per second and time to first token against ``mlx_lm.server``, turn about in one run.

    python benchmarks/random_base.py /tmp/qwen05b
    python benchmarks/serve_speed.py --model /tmp/qwen05b --k 4 --json speed.json

Both servers run all the time, each in its own process; a round is asked of one while the other is
idle, and then of the other. Prompts are fresh documents, so nothing is ever cached. Both get the
same text through the same endpoint; ours merges all of it, by an adapter whose LoRA and encoder are
fresh (their numbers change nothing about speed). A bias keeps both to tokens that the tokenizer
knows and that do not end an answer.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from measure import start_server, stop_server
from openai import OpenAI

OURS, THEIRS = "kmerge-mlx serve", "mlx_lm.server"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
KEYS = (
    *(f"self_attn.{name}" for name in PROJECTIONS),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a base, see random_base.py")
    parser.add_argument("--adapter-path", help="default: a fresh one, written for this run")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--length", type=int, default=2000, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=16, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here too")
    return parser.parse_args()


def write_adapter(model: str, k: int, folder: Path) -> None:
    """A fresh adapter: the paper's encoder, and LoRA of rank 4 on every layer."""
    from mlx_lm.utils import load

    from kmerge_mlx.adapters.folder import save_adapter
    from kmerge_mlx.adapters.schema import (
        EncoderConfig,
        LoRAConfig,
        LoRASpec,
        MergeConfig,
        inner_size,
    )
    from kmerge_mlx.base import default_pad_token_id
    from kmerge_mlx.model import adapter_of, wire
    from kmerge_mlx.prompts.lay_out import ALL, Layout

    llm, tokenizer = load(model)
    d = llm.args.hidden_size
    layout = Layout(merges=ALL, chat_template=False)
    merge = MergeConfig(EncoderConfig(k, d, inner_size(k, d)), layout=layout)
    tuning = LoRAConfig(len(llm.layers), 0.0, LoRASpec(4, 4.0), KEYS)
    wire(llm, merge, tuning, default_pad_token_id(tokenizer))
    save_adapter(adapter_of(llm, merge, tuning), folder)


class Prompts:
    """Documents of a length in tokens, no two alike, and the bias that keeps answers going."""

    def __init__(self, model: str, length: int, seed: int):
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._length, self._rng = length, random.Random(seed)
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        known = [self._tokenizer.encode(c, add_special_tokens=False)[0] for c in letters]
        self.bias = {str(token): 100 for token in known}

    def fresh(self) -> str:
        """A tree-like text of that many tokens."""
        rows: list[str] = []
        while True:
            rows += [
                "+" * self._rng.randint(1, 4) + "".join(self._rng.choices("ABCDEFGHIJ", k=2))
                for _ in range(max(1, self._length // 4 - len(rows)))
            ]
            text = "\n".join(rows)
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(ids) >= self._length:
                return self._tokenizer.decode(ids[: self._length])


def ask(client: OpenAI, text: str, given: argparse.Namespace, bias: dict[str, int]) -> float:
    """Asks once; returns the seconds to the first token, once the last is there."""
    begin, first = time.perf_counter(), 0.0
    stream = client.completions.create(
        model="default_model",
        prompt=text,
        max_tokens=given.answer,
        temperature=0,
        stream=True,
        logit_bias=bias,
    )
    for piece in stream:
        if not first and piece.choices and piece.choices[0].text:
            first = time.perf_counter() - begin
    return first


def measure(url: str, texts: list[str], given: argparse.Namespace, bias: Any) -> dict[str, Any]:
    """A round: all of the requests, so many at a time."""
    client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=1800)
    begin = time.perf_counter()
    with ThreadPoolExecutor(given.clients) as pool:
        firsts = list(pool.map(lambda text: ask(client, text, given, bias), texts))
    return {"requests_per_second": len(texts) / (time.perf_counter() - begin), "ttft": firsts}


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def run(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both servers, round by round, whoever is first changing."""
    adapter = given.adapter_path
    if adapter is None:
        adapter = str(scratch / "adapter")
        # In a process of its own: this one must not hold a model while others are timed.
        asked = f"{given.model!r}, {given.k}, {adapter!r}"
        code = f"import serve_speed; serve_speed.write_adapter({asked})"
        here = Path(__file__).parent
        subprocess.run([sys.executable, "-c", code], check=True, cwd=here)
    prompts = Prompts(given.model, given.length, given.seed)
    rounds: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    with ExitStack() as open_, (scratch / "servers.log").open("w") as log:
        urls, model = {}, ["--model", given.model]
        ours = ["kmerge_mlx", "serve", *model, "--adapter-path", adapter, "--k", str(given.k)]
        for name, line in ((OURS, ours), (THEIRS, ["mlx_lm", "server", *model])):
            server, urls[name] = start_server(line, log)
            open_.callback(stop_server, server)
            measure(urls[name], [prompts.fresh()], given, prompts.bias)  # nobody's first is timed
        for number in range(given.rounds):
            for name in sorted(rounds, reverse=bool(number % 2)):
                texts = [prompts.fresh() for _ in range(given.requests)]
                rounds[name].append(measure(urls[name], texts, given, prompts.bias))
                rate = rounds[name][-1]["requests_per_second"]
                print(f"round {number + 1}: {name} {rate:.3f} requests/s", flush=True)
    return summary(rounds)


def summary(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures of both, and how they compare in each round."""
    pairs = zip(rounds[OURS], rounds[THEIRS], strict=True)
    ratios = [a["requests_per_second"] / b["requests_per_second"] for a, b in pairs]
    result: dict[str, Any] = {"ratios": ratios, "median_ratio": median(ratios)}
    for name, measured in rounds.items():
        firsts = [first for one in measured for first in one["ttft"]]
        result[name] = {
            "requests_per_second": [one["requests_per_second"] for one in measured],
            "ttft_p50": quantile(firsts, 0.5),
            "ttft_p95": quantile(firsts, 0.95),
        }
    return result


def main() -> None:
    given = arguments()
    given.model = str(Path(given.model).resolve()) if Path(given.model).exists() else given.model
    with tempfile.TemporaryDirectory() as scratch:
        result = run(given, Path(scratch))
    print(f"\n{'':18} requests/s   TTFT p50   TTFT p95")
    for name in (OURS, THEIRS):
        row = result[name]
        rate = median(row["requests_per_second"])
        print(f"{name:18} {rate:10.3f} {row['ttft_p50']:8.2f} s {row['ttft_p95']:8.2f} s")
    print(f"{result['median_ratio']:.2f} times the requests/s (median of {given.rounds} rounds)")
    if given.json:
        settings = {k: str(v) for k, v in vars(given).items()}
        given.json.write_text(json.dumps({"settings": settings} | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
