"""The Python side of the quick start: convert, load, generate one by one and in a batch.

    python examples/python_api.py [BASE CHECKPOINT]

Without arguments it uses the tiny checkpoint of the parity tests, so nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from kmerge_mlx import batch_generate, lay_out, load, stream_generate
from kmerge_mlx.convert.checkpoint import convert_checkpoint

HERE = Path(__file__).parent
UPSTREAM = HERE.parent / "tests" / "fixtures" / "upstream_tied_k4"


def main() -> None:
    base, checkpoint = sys.argv[1:3] or (str(UPSTREAM / "base"), str(UPSTREAM / "checkpoint"))
    with tempfile.TemporaryDirectory() as folder:
        adapter_path = Path(folder) / "adapter"
        convert_checkpoint(checkpoint, adapter_path, model=base)
        model, tokenizer = load(base, adapter_path)

        # All of the prompt merges, as in the paper.
        prompt = (HERE / "tree.txt").read_text()
        for response in stream_generate(model, tokenizer, prompt, max_tokens=8):
            print(response.text, end="", flush=True)
        print(
            f"\n{response.prompt_tokens} tokens in {response.compressed_tokens} positions, "
            f"{response.compression_ratio:.2f}x"
        )

        # Many prompts at once, by mlx-lm's continuous batching.
        answers = batch_generate(model, tokenizer, [prompt, prompt[:60]], max_tokens=8)
        print(answers.texts, answers.prompt_tokens, answers.compressed_tokens)

        # A context that merges and a question that stays exact, token by token.
        for segment in lay_out(tokenizer, "Tree: JN\n+WO", "Parent: JN, Child: WO"):
            print("merged" if segment.merge else "raw", len(segment.ids), "tokens")


if __name__ == "__main__":
    main()
