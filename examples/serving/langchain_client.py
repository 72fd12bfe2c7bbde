"""Asks a running ``kmerge-mlx serve`` through LangChain.

kmerge-mlx serve &
python examples/serving/langchain_client.py
"""

from __future__ import annotations

import os
from pathlib import Path

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

from kmerge_mlx.prompts.tags import escape

TREE = (Path(__file__).parents[1] / "tree.txt").read_text()


def main() -> None:
    model = ChatOpenAI(
        model="default_model",
        base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8080/v1"),
        api_key=os.environ.get("API_KEY", "none"),
        max_tokens=4,
        temperature=0,
    )
    # Tags say what merges, so any prompt template can; what the text itself holds is no tag.
    prompt = ChatPromptTemplate.from_messages([("user", "<merge>{context}</merge>")])
    answer = (prompt | model).invoke({"context": escape(TREE)})
    print(answer.content)
    usage = answer.response_metadata["token_usage"]
    print(f"{usage['prompt_tokens']} tokens in {usage['compressed_tokens']} positions")
    print("".join(piece.content for piece in (prompt | model).stream({"context": escape(TREE)})))


if __name__ == "__main__":
    main()
