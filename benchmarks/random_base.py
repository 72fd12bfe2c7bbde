"""Writes a base model of a known shape with random weights: speed and memory need no others.

    python benchmarks/random_base.py /tmp/qwen05b && \\
        kmerge-mlx bench --model /tmp/qwen05b --k 2 --k 4 --k 8

The shape is Qwen2.5-0.5B's; every size in it has an option (--num-hidden-layers 4). The tokenizer
is the bundled model's, much smaller than the vocabulary: `bench` draws token ids and never decodes.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2

from kmerge_mlx.files import replacing_folder, write_json, write_safetensors

TOKENIZER = Path(__file__).parents[1] / "examples" / "bundled" / "tokenizer.py"
QWEN_05B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
}
ROPE_THETA = 1_000_000.0


def bundled_tokenizer() -> ModuleType:
    """The script that makes the bundled model's tokenizer."""
    spec = importlib.util.spec_from_file_location("bundled_tokenizer", TOKENIZER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, sizes: dict[str, int], dtype: str) -> int:
    """Writes the model folder, all of it or nothing.

    Returns:
        How many parameters the model has.
    """
    script = bundled_tokenizer()
    with replacing_folder(folder) as new:
        eos = script.save(new).token_to_id(script.EOS)
        config: dict[str, Any] = {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            **sizes,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            # mlx-lm reads the first, transformers the second.
            "rope_theta": ROPE_THETA,
            "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
            "eos_token_id": eos,
            "dtype": dtype,
        }
        write_json(new / "config.json", config)
        mx.random.seed(0)
        model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
        model.set_dtype(getattr(mx, dtype))
        weights = dict(tree_flatten(model.parameters()))
        write_safetensors(new / "model.safetensors", weights)
    return sum(array.size for array in weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    for name, size in QWEN_05B.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=size, help=f"default: {size}"
        )
    given = vars(parser.parse_args())
    if given["folder"].exists():
        parser.error(f"{given['folder']} exists")
    if min(given[name] for name in QWEN_05B) < 1:
        parser.error("every size must be at least 1")
    size, heads = given["hidden_size"], given["num_attention_heads"]
    shared = given["num_key_value_heads"]
    if size % (2 * heads) or heads % shared:
        parser.error(
            f"--hidden-size {size} must be an even number for each of --num-attention-heads "
            f"{heads}, and those a multiple of --num-key-value-heads {shared}"
        )
    count = write(given["folder"], {name: given[name] for name in QWEN_05B}, given["dtype"])
    print(f"{count / 1e6:.1f}M parameters in {given['folder']}")


if __name__ == "__main__":
    main()
