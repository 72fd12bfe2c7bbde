"""What a restarted server's first answer about a long document costs, with a folder of caches.

    python benchmarks/serve_restart.py --model M --tokens 8000

The first server reads the document; it ends by SIGTERM, or is killed 20 s after its answers. The
second one is asked another question about it. Each figure is of one request, the first of its
server but for a short one that warms it up. The document is random tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import start_server, stop_server
from openai import OpenAI


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--adapter-path")
    parser.add_argument("--k")
    parser.add_argument("--tokens", type=int, default=8000, help="of the document")
    parser.add_argument("--raw", action="store_true", help="read it unmerged, also with an adapter")
    parser.add_argument("--kill", action="store_true", help="kill the first server")
    parser.add_argument("--json", type=Path, help="write the result here too")
    return parser.parse_args()


def ask(url: str, document: list[int], question: list[int], merge: bool) -> dict[str, Any]:
    """Seconds to the first token and to the last, and how many tokens a cache held."""
    client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600)
    begin, first, usage = time.perf_counter(), None, None
    stream = client.completions.create(
        model="default_model",
        prompt=document + question,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"merge": merge},
    )
    for piece in stream:
        if piece.choices and first is None:
            first = time.perf_counter() - begin
        usage = piece.usage or usage
    return {
        "time_to_first_token": first,
        "seconds": time.perf_counter() - begin,
        "prompt_tokens": usage.prompt_tokens,
        "positions": usage.compressed_tokens,
        "cached_tokens": usage.prompt_tokens_details.cached_tokens,
    }


def main() -> None:
    given, rng = arguments(), random.Random(0)
    document = [rng.randrange(300, 5000) for _ in range(given.tokens)]
    questions = [[rng.randrange(300, 5000) for _ in range(16)] for _ in range(3)]
    line = ["kmerge_mlx", "serve", "--model", given.model, "--request-timeout", "3600"]
    line += ["--adapter-path", given.adapter_path] if given.adapter_path else []
    line += ["--k", given.k] if given.k else []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        line += ["--prompt-cache-dir", folder]
        for name, question in zip(("first", "second"), questions, strict=False):
            begin = time.perf_counter()
            server, url = start_server(line)
            result[f"{name}_start_seconds"] = time.perf_counter() - begin
            ask(url, questions[2], [], not given.raw)
            result[name] = ask(url, document, question, not given.raw)
            if name == "first":
                result["same_server"] = ask(url, document, questions[1], not given.raw)
            begin = time.perf_counter()
            if given.kill and name == "first":
                time.sleep(20)  # it writes in the background
                server.kill()
                server.wait()
            else:
                stop_server(server)
            result[f"{name}_stop_seconds"] = time.perf_counter() - begin
        sizes = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
        result |= {"files": len(sizes), "largest_file_bytes": max(sizes)}
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
