"""Asks a running ``kmerge-mlx serve`` with the ``openai`` package: a chat, and a stream.

    kmerge-mlx serve &
    python examples/serving/openai_client.py

BASE_URL and API_KEY in the environment say otherwise where the server is not at the default place.
"""

from __future__ import annotations

import os
from pathlib import Path

from openai import OpenAI

TREE = (Path(__file__).parents[1] / "tree.txt").read_text()


def main() -> None:
    client = OpenAI(
        base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8080/v1"),
        api_key=os.environ.get("API_KEY", "none"),
    )
    (model,) = client.models.list().data

    # The bundled model was trained on prompts that merge whole: "merge" says so for this message.
    answer = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": TREE, "merge": True}],
        max_tokens=4,
    )
    usage = answer.usage
    print(answer.choices[0].message.content)
    print(f"{usage.prompt_tokens} tokens in {usage.compressed_tokens} positions")

    stream = client.completions.create(
        model=model.id,
        prompt=f"<merge>{TREE}</merge>",
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    for piece in stream:
        if piece.choices:
            print(piece.choices[0].text, end="", flush=True)
        else:
            print(f"\n{piece.usage.prompt_tokens_details.cached_tokens} tokens were cached")


if __name__ == "__main__":
    main()
