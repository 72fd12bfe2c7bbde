"""Time to first token: a compressed prompt against plain mlx-lm, in one process, interleaved.

For every prompt length T and merge factor K three things are timed in turn, several times over:
plain mlx-lm on T tokens, plain mlx-lm on ceil(T / K) tokens (the floor: what reading that many
positions costs anyway), and this project on T tokens merged to ceil(T / K) positions, with blocks
never seen before. Weights are random: TTFT depends on the shape alone. The merged side carries the
reference's LoRA only with --lora, because the floor then has to carry it too.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0 \\
        python benchmarks/ttft.py --k 4 --length 1024 --length 4096
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen2

from kmerge_mlx import lora, model
from kmerge_mlx.adapter import Adapter
from kmerge_mlx.blocks import MergedEmbedding
from kmerge_mlx.config import EncoderConfig, LoRASpec, MergeConfig, inner_size
from kmerge_mlx.encoder import MergeEncoder
from kmerge_mlx.prompt import Segment
from kmerge_mlx.tuning import LoRAConfig

QWEN_05B = qwen2.ModelArgs(
    model_type="qwen2",
    hidden_size=896,
    num_hidden_layers=24,
    intermediate_size=4864,
    num_attention_heads=14,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    vocab_size=151_936,
    max_position_embeddings=32_768,
    rope_theta=1_000_000.0,
    tie_word_embeddings=True,
)
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
PAD = 220


def build(k: int, with_lora: bool, dtype: mx.Dtype) -> tuple[nn.Module, nn.Module]:
    """Two models over the same weights: plain, and one that takes virtual ids."""
    mx.random.seed(0)
    plain, merged = qwen2.Model(QWEN_05B), qwen2.Model(QWEN_05B)
    plain.set_dtype(dtype)
    mx.eval(plain.parameters())
    merged.update(plain.parameters())
    d = QWEN_05B.hidden_size
    sizes = EncoderConfig(k, d, inner_size(k, d))
    encoder = tree_map(lambda a: a.astype(dtype), dict(MergeEncoder(sizes).parameters()))
    flat = {f"{layer}.{n}": a for layer, part in encoder.items() for n, a in part.items()}
    config = LoRAConfig(0)
    if with_lora:
        config = LoRAConfig(QWEN_05B.num_hidden_layers, 0.0, LoRASpec(4, 4.0), PROJECTIONS)
    lora.attach(plain, config)
    plain.eval()
    adapter = Adapter(MergeConfig(sizes), config, lora.parameters(plain), flat)
    model.attach(merged, adapter, PAD)
    mx.eval(plain.parameters(), merged.parameters())
    return plain, merged


def first_token(llm: nn.Module, ids: Sequence[int]) -> None:
    """Prefills and waits for one token, as generation does."""
    next(generate_step(mx.array(ids), llm, max_tokens=1))


def timed(action, *arguments) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def compressed_first_token(llm: nn.Module, embedding: MergedEmbedding, ids: list[int]) -> None:
    first_token(llm, embedding.compress([Segment(ids)]).ids)


def measure(
    k: int, length: int, repeats: int, with_lora: bool, full: bool, dtype: mx.Dtype
) -> dict:
    plain, merged = build(k, with_lora, dtype)
    embedding = model.merged_embedding(merged)
    positions = -(-length // k)
    times: dict[str, list[float]] = {"full": [], "floor": [], "merged": []}
    for repeat in range(-1, repeats):  # the first round is the warm-up
        ids = mx.random.randint(0, 150_000, (length,)).tolist()
        round_times = {
            "floor": timed(first_token, plain, ids[:positions]),
            "merged": timed(compressed_first_token, merged, embedding, ids),
        }
        if full:
            round_times["full"] = timed(first_token, plain, ids)
        if repeat >= 0:
            for name, seconds in round_times.items():
                times[name].append(seconds)
    ratios = [m / f for m, f in zip(times["merged"], times["floor"], strict=True)]
    row = {"k": k, "length": length, "positions": positions, "lora": with_lora}
    row |= {name: statistics.median(values) for name, values in times.items() if values}
    row |= {"merged_over_floor": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}
    if full:
        row["speedup"] = row["full"] / row["merged"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, action="append")
    parser.add_argument("--length", type=int, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lora", action="store_true", help="both sides carry rank-4 LoRA")
    parser.add_argument("--full", action="store_true", help="also time the whole prompt unmerged")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    print(f"{mx.default_device()}, {arguments.dtype}, Qwen2.5-0.5B shape, random weights")
    for k in arguments.k or [4]:
        for length in arguments.length or [1024, 4096]:
            row = measure(
                k,
                length,
                arguments.repeats,
                arguments.lora,
                arguments.full,
                getattr(mx, arguments.dtype),
            )
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            low, high = row["spread"]
            print(
                f"K={k} T={length}: merged {row['merged']:.3f} s, "
                f"mlx-lm on {row['positions']} tokens {row['floor']:.3f} s, "
                f"ratio {row['merged_over_floor']:.3f} ({low:.3f}-{high:.3f})"
                + (f", {row['speedup']:.2f}x faster than unmerged" if arguments.full else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
