"""Writes a base model of a known shape with random weights: speed and memory need no others.

    python benchmarks/random_base.py /tmp/qwen05b && \\
        kmerge-mlx bench --model /tmp/qwen05b --k 2 --k 4 --k 8

For a folder that other programs read, or another size; `kmerge-mlx bench --shape` needs none. Every
size of the shape has an option (--num-hidden-layers 4). The tokenizer is the bundled model's, much
smaller than the vocabulary: `bench` draws token ids and never decodes.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx.utils import tree_flatten

from kmerge_mlx.files import replacing_folder, write_json, write_safetensors
from kmerge_mlx.tools.random_base import RandomBase
from kmerge_mlx.tools.shapes import SHAPES

TOKENIZER = Path(__file__).parents[1] / "examples" / "bundled" / "tokenizer.py"
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
SIZES += ("num_key_value_heads", "vocab_size", "max_position_embeddings")


def bundled_tokenizer() -> ModuleType:
    """The script that makes the bundled model's tokenizer."""
    spec = importlib.util.spec_from_file_location("bundled_tokenizer", TOKENIZER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, shape: dict[str, Any], dtype: str) -> int:
    """Writes the model folder, all of it or nothing.

    Returns:
        How many parameters the model has.
    """
    script = bundled_tokenizer()
    with replacing_folder(folder) as new:
        eos = script.save(new).token_to_id(script.EOS)
        # mlx-lm reads rope_theta and rope_scaling, transformers this.
        rope = {"rope_theta": shape["rope_theta"], "rope_type": "default"}
        rope |= shape.get("rope_scaling", {})
        config = shape | {"rope_parameters": rope, "eos_token_id": eos, "dtype": dtype}
        write_json(new / "config.json", config)
        weights = dict(tree_flatten(RandomBase(str(folder), config, dtype).make().parameters()))
        write_safetensors(new / "model.safetensors", weights)
    return sum(array.size for array in weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: the shape's")
    given = vars(parser.parse_args())
    if given["folder"].exists():
        parser.error(f"{given['folder']} exists")
    changed = {name: given[name] for name in SIZES if given[name] is not None}
    shape = SHAPES[given["shape"]] | changed
    if min(shape[name] for name in SIZES) < 1:
        parser.error("every size must be at least 1")
    size, heads = shape["hidden_size"], shape["num_attention_heads"]
    shared = shape["num_key_value_heads"]
    if ("head_dim" not in shape and size % (2 * heads)) or heads % shared:
        parser.error(
            f"--hidden-size {size} must be an even number for each of --num-attention-heads "
            f"{heads}, and those a multiple of --num-key-value-heads {shared}"
        )
    count = write(given["folder"], shape, given["dtype"])
    print(f"{count / 1e6:.1f}M parameters in {given['folder']}")


if __name__ == "__main__":
    main()
