"""LCLM's shapes with random weights: a checkpoint to convert, and the encoder's price beside K = 4.

    python benchmarks/lclm.py make checkpoint [--share 4] [--dtype bfloat16]
    kmerge-mlx convert checkpoint lclm
    python benchmarks/lclm.py time lclm [--length 1024] [-n 5]

``make`` writes Qwen3-Embedding-0.6B's shape and Qwen3-4B's, or one layer in ``--share`` of both,
which leaves the price of one beside the other as it is. ``time`` reads random prompts by turns in
one process: the decoder alone, merged by the window encoder, and merged by a K = 4 MLP of the
paper's size, each beside the decoder alone on as many tokens as there are positions (the floor).
"""

from __future__ import annotations

import argparse
import json
import shutil
from math import prod
from pathlib import Path

import mlx.core as mx

FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "lclm_cs4_w16" / "checkpoint"
ROWS = 151_936
SHAPES = {
    "decoder": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "encoder": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
COMMON = {"model_type": "qwen3", "vocab_size": ROWS, "tie_word_embeddings": True}
COMMON |= {"rms_norm_eps": 1e-6, "rope_theta": 5e6, "max_position_embeddings": 262_144}
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def random(dtype: mx.Dtype, *shape: int) -> mx.array:
    """Numbers that repeat after a million: MLX's CPU backend draws slowly."""
    size = prod(shape)
    drawn = mx.random.uniform(-0.02, 0.02, (min(size, 1 << 20),)).astype(dtype)
    return mx.tile(drawn, -(-size // drawn.size))[:size].reshape(shape)


def make_part(folder: Path, name: str, share: int, dtype: mx.Dtype) -> None:
    """A language model, one file a layer."""
    shape = SHAPES[name] | {"num_hidden_layers": SHAPES[name]["num_hidden_layers"] // share}
    d, h, width = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = (shape[f"num_{kind}_heads"] * width for kind in ("attention", "key_value"))
    linear = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    linear |= {"self_attn.o_proj": (d, q), "mlp.gate_proj": (h, d), "mlp.up_proj": (h, d)}
    linear |= {"mlp.down_proj": (d, h)}
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    norms |= {"self_attn.q_norm": width, "self_attn.k_norm": width}
    folder.mkdir(parents=True)
    inside = "model." if name == "decoder" else ""
    files = [{"embed_tokens.weight": (ROWS, d), "norm.weight": (d,)}]
    for layer in range(shape["num_hidden_layers"]):
        own = linear | {norm: (size,) for norm, size in norms.items()}
        files.append({f"layers.{layer}.{n}.weight": each for n, each in own.items()})
    for i, each in enumerate(files):
        tensors = {f"{inside}{n}": random(dtype, *shape) for n, shape in each.items()}
        mx.save_safetensors(str(folder / f"model-{i + 1:05d}-of-{len(files):05d}"), tensors)
    (folder / "config.json").write_text(json.dumps(COMMON | shape))
    for file in (FIXTURE / name).glob("tokenizer*"):
        shutil.copy(file, folder)


def make(given: argparse.Namespace) -> None:
    dtype = DTYPES[given.dtype]
    for name in SHAPES:
        make_part(given.folder / name, name, given.share, dtype)
    d, e = (SHAPES[name]["hidden_size"] for name in ("decoder", "encoder"))
    shapes = {"norm.weight": (e,), "fc1.weight": (d, e), "fc1.bias": (d,), "fc2.weight": (d, d)}
    tensors = {n: random(dtype, *shape) for n, shape in (shapes | {"fc2.bias": (d,)}).items()}
    (given.folder / "adapter").mkdir()
    mx.save_safetensors(str(given.folder / "adapter" / "adapter"), tensors)
    about = {"compression_ratio": 4, "encoder_window_size": 1024, "boundary_overlap": 0}
    about |= {"pooling": "mean", "encoder_mask_type": "causal", "adapter_type": "mlp"}
    (given.folder / "model_config.json").write_text(json.dumps(about))


def time(given: argparse.Namespace) -> None:
    from kmerge_mlx.source import Source
    from kmerge_mlx.tools.bench import BenchmarkConfig, load_sides, measure

    source = Source.find(str(given.folder))
    lengths = (given.length,)
    plain, *window = load_sides(source, {4: source}, lengths, 0)
    _, *mlp = load_sides(source, {4: None}, lengths, 0)
    for side in mlp:
        # One copy of the decoder's layers is enough.
        side.llm.model.update({"layers": plain.llm.model.parameters()["layers"]})
    config = BenchmarkConfig(lengths, given.rounds, 1, 2048, 0, 0)
    rows = measure([plain, *window, *mlp], config)
    for name, row in zip(("decoder alone", "window encoder", "K = 4 MLP"), rows, strict=True):
        seconds = row.figures.time_to_first_token
        line = f"{name}: {row.positions:,} positions, TTFT {seconds.median:.2f} s"
        line += f" ({seconds.min:.2f}-{seconds.max:.2f})"
        if row.speedup is not None:
            line += f", {row.speedup.median:.2f}x, {row.overhead.median:.2f} times its floor"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("make", "time"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=int, default=1, help="make: one layer in so many")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bfloat16")
    parser.add_argument("--length", type=int, default=1024, help="time: tokens of a prompt")
    parser.add_argument("-n", "--rounds", type=int, default=5, help="time: rounds that count")
    given = parser.parse_args()
    {"make": make, "time": time}[given.what](given)


if __name__ == "__main__":
    main()
