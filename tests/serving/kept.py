"""Servers with a folder of prompt caches, and what they answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kmerge_mlx.generation.prompt_cache import _seal
from tests.servers import FIXTURE_EOS, Address, eventually, serving

TOLERANCE = 1e-4
NO_END = {"logit_bias": {str(FIXTURE_EOS): -100}}
WORDS = "one two three four five six seven eight nine ten and so".split()  # noqa: SIM905


def document(seed: int = 0, words: int = 90) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "."


def prompt_of(seed: int = 0, question: str = "Which is it?") -> str:
    return f"<merge>{document(seed)}</merge><raw>\n\n{question}</raw>"


def ask(server: Address, prompt: Any, **more: Any) -> tuple[list[float], dict[str, Any]]:
    """The log-probabilities of an answer, and its usage."""
    body = {"prompt": prompt, "max_tokens": 6, "logprobs": 0} | NO_END | more
    answer = server.complete(**body)
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["logprobs"]["token_logprobs"], answer.json["usage"]


def cached(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def alike(found: list[float], wanted: list[float]) -> bool:
    return found == pytest.approx(wanted, rel=0, abs=TOLERANCE)


def events(server: Address, event: str) -> float:
    return server.metric(f'prompt_cache_files_total{{event="{event}"}}')


@contextmanager
def keeping(folder: Path, *named: Any, **settings: Any) -> Iterator[Address]:
    """A server with a folder, which is written when the block ends."""
    with serving(*named, prompt_cache_dir=str(folder), **settings) as server:
        yield server
        flush(server)


def flush(server: Address) -> None:
    busy = server.server.service.generator.folder.flushing()
    eventually(lambda: not busy())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


def claims(file: Path, at: Path, **changes: Any) -> Path:
    """A copy of a file that says other things of itself."""
    arrays, metadata = mx.load(str(file), return_metadata=True)
    entry = json.loads(metadata["0.kmerge_mlx"])
    for name, value in changes.items():
        entry[name] = value(entry[name])
    entry["seal"] = _seal({name: value for name, value in entry.items() if name != "seal"})
    mx.save_safetensors(str(at), arrays, metadata | {"0.kmerge_mlx": json.dumps(entry)})
    return at
