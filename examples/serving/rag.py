"""Retrieval: the documents that were found merge, the question stays raw.

    kmerge-mlx serve &
    python examples/serving/rag.py "Is TM a child of JG?"

The bundled model reads trees alone, so its answer means little here; with a model of your own only
the documents change. What matters is the message: one part of it merges and one does not, and a
second question about the same documents finds them cached.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from math import log

from openai import OpenAI

DOCUMENTS = [
    "Tree: JN\n+WO\n++UP\n++JG\n+++VN\n+++TM\n+++BF",
    "Tree: AB\n+CD\n++EF\n+GH\n++IJ\n++KL",
    "Tree: QR\n+ST\n+UV\n++WX\n+++YZ",
]


def words(text: str) -> Counter[str]:
    return Counter("".join(c if c.isalnum() else " " for c in text).split())


def retrieve(question: str, count: int = 2) -> list[str]:
    """The documents that share the rarest words with a question (TF-IDF)."""
    found_in = Counter(word for document in DOCUMENTS for word in words(document))
    wanted = words(question)

    def score(document: str) -> float:
        counts = words(document)
        return sum(counts[w] * log(1 + len(DOCUMENTS) / found_in[w]) for w in wanted if counts[w])

    return sorted(DOCUMENTS, key=score, reverse=True)[:count]


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else "Is TM a child of JG?"
    client = OpenAI(
        base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8080/v1"),
        api_key=os.environ.get("API_KEY", "none"),
    )
    documents = "\n\n".join(retrieve(question))
    for asked in (question, f"{question} Why?"):
        answer = client.chat.completions.create(
            model="default_model",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": documents, "merge": True},
                        {"type": "text", "text": f"\n\n{asked}", "merge": False},
                    ],
                }
            ],
            max_tokens=4,
        )
        usage = answer.usage
        print(f"{asked} {answer.choices[0].message.content}")
        print(
            f"  {usage.prompt_tokens} tokens in {usage.compressed_tokens} positions, "
            f"{usage.prompt_tokens_details.cached_tokens} tokens cached"
        )


if __name__ == "__main__":
    main()
