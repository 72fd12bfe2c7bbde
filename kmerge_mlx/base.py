"""Finds a base model, and reads its config, its tokenizer and the token that pads a block."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

# mlx-lm has no public name for its table of architectures.
from mlx_lm.utils import (
    DEFAULT_ALLOW_PATTERNS,
    _get_classes,
    load_config,
    load_tokenizer,
    quantize_model,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from kmerge_mlx import bundled, files
from kmerge_mlx.config import CARRIED, is_int, is_number
from kmerge_mlx.detokenizer import exact
from kmerge_mlx.errors import ModelError, first_line, short
from kmerge_mlx.hub import fetch

# The config entries by which two base models are told apart.
FINGERPRINT = (
    *("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    "rope_theta",
)
# Those that are above 0 where they are there; some models list one of them for each layer.
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
SIZES += ("num_key_value_heads",)

# What mlx-lm and transformers raise over a folder that is not a model, or over impossible sizes.
LOAD_ERRORS = (ValueError, LookupError, TypeError, RuntimeError, OSError)
LOAD_ERRORS += (ArithmeticError, AssertionError, AttributeError)
# Sizes of a base's files beyond which it is not one: ten times those of the largest known.
CONFIGS = ("config.json", "generation_config.json")
MAX_CONFIG_BYTES, MAX_TEXT_BYTES, MAX_LAYERS = 4 << 20, 256 << 20, 1024
# What weights may be cast to, as configs and ``--dtype`` name it.
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Architectures that the tests compare with transformers and PEFT; others are probed at load.
PROVEN = frozenset({"qwen2", "qwen3", "llama", "mistral", "gemma3_text", "smollm3"})


def resolve(path_or_hf_repo: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a base model, downloaded from the hub if it is not one already.

    ``weights`` may be left there; the config, the tokenizer and a carried adapter always come.
    """
    if path_or_hf_repo == bundled.BUNDLED:
        return bundled.BASE
    path = Path(path_or_hf_repo)
    try:
        if path.is_dir():
            return path
        if path.exists():
            raise ModelError(f"`model` {path} is a file: give the folder that holds config.json")
    except OSError as e:
        raise ModelError(f"cannot read `model` {path}: {e.strerror}") from None
    patterns = [p for p in DEFAULT_ALLOW_PATTERNS if weights or "safetensors" not in p]
    return fetch(str(path_or_hf_repo), [*patterns, f"{CARRIED}/*"], ModelError, revision=revision)


def read_config(path: Path) -> dict[str, Any]:
    """A base model's config, spelled the way every mlx-lm model reads it."""
    try:
        _check_files(path)
        config = normalise(load_config(path))
    except FileNotFoundError:
        raise ModelError(f"{path} holds no config.json: `model` takes a base model") from None
    except LOAD_ERRORS as error:
        raise ModelError(f"{path}/config.json cannot be read: {first_line(error)}") from None
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}/config.json names no model_type: `model` takes a base model")
    for name, value in text_config(config).items():
        expected = None
        if name.endswith("layers") and is_int(value, MAX_LAYERS + 1):
            expected = f"up to {MAX_LAYERS}"
        if name in SIZES and not (is_int(value, 1) or value is None or isinstance(value, list)):
            expected = "a whole number above 0"
        if expected:
            raise ModelError(f"{path}/config.json: {name} is {short(value)}, expected {expected}")
    return config


def _check_files(path: Path) -> None:
    """Refuses what mlx-lm and transformers would read without end: pipes, devices, huge texts."""
    for pattern in DEFAULT_ALLOW_PATTERNS:
        for file in path.glob(pattern):
            most = MAX_CONFIG_BYTES if file.name in CONFIGS else MAX_TEXT_BYTES
            if file.suffix in (".safetensors", ".jsonl"):  # the one is weighed later, the other
                most = 1 << 62  # is nothing of a model
            if file.exists():
                files.check_plain(file, most, ModelError)


def read_tokenizer(
    path: Path,
    config: Mapping[str, Any],
    name: str,
    trust_remote_code: bool = False,
    options: Mapping[str, Any] | None = None,
) -> TokenizerWrapper:
    """The tokenizer of a base, which errors call ``name``, with its config's end-of-text tokens."""
    settings = {"trust_remote_code": trust_remote_code, **(options or {})}
    try:
        tokenizer = load_tokenizer(path, settings, eos_token_ids=config.get("eos_token_id"))
        known = {*tokenizer.encode("Aa 0.", add_special_tokens=False)}
    except Exception as error:  # the tokenizers library has no class of its own for its errors
        raise ModelError(f"cannot load {name}: {first_line(error)}") from error
    if not known - {*tokenizer.all_special_ids}:  # transformers makes an empty one without a file
        raise ModelError(
            f"the tokenizer of {name} knows no text: {path} lacks tokenizer.json, or what stands "
            "for it"
        )
    # Its limit is on tokens, and makes it warn; ours is on positions (generation.check_context).
    tokenizer._tokenizer.model_max_length = VERY_LARGE_INTEGER
    rows = text_config(config).get("vocab_size")
    tokenizer.table_rows = rows if is_int(rows) else None  # what rows of data are checked with
    return exact(tokenizer)


def default_pad_token_id(tokenizer: Any) -> int:
    """The token that fills the last block: a space, else the pad, else the eos token.

    Source: the rule of the paper's code; docs/method.md.
    """
    space = tokenizer.encode(" ", add_special_tokens=False)
    for token in (*space[:1], tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError("the tokenizer has no space, pad or eos token to fill the last block with")


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spells a config the way every mlx-lm model reads it.

    transformers 5 writes ``rope_parameters`` (and gemma3's layer pattern as ``layer_types``);
    several mlx-lm models read only the older names and silently fall back to their defaults,
    which moves the logits without changing the argmax. The copy has both spellings.
    """
    fixed = dict(config)
    if isinstance(fixed.get("text_config"), Mapping):
        fixed["text_config"] = normalise(fixed["text_config"])
    if isinstance(rope := fixed.get("rope_parameters"), Mapping):
        _spell_rope(fixed, rope)
    types = fixed.get("layer_types")
    if isinstance(types, list) and "full_attention" in types and "sliding_attention" in types:
        fixed.setdefault("sliding_window_pattern", types.index("full_attention") + 1)
    return fixed


def _spell_rope(config: dict[str, Any], rope: Mapping[str, Any]) -> None:
    # Models with sliding windows keep one set of parameters per kind of layer.
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    if not isinstance(full, Mapping):
        return
    for name in ("rope_theta", "partial_rotary_factor"):
        if full.get(name) is not None and config.get(name) is None:
            config[name] = full[name]
    if full.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
        config["rope_scaling"] = dict(full)
    if isinstance(sliding, Mapping) and "rope_theta" in sliding:
        config.setdefault("rope_local_base_freq", sliding["rope_theta"])


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a (multimodal) config."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config by which bases are told apart; a quantized one is the same base."""
    text = text_config(config)
    return {name: text[name] for name in FINGERPRINT if text.get(name) is not None}


def scales_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the model multiplies embeddings by sqrt(D) after the look-up, as Gemma does."""
    return str(text_config(config).get("model_type", "")).startswith("gemma")


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the output head is the embedding table, or None where the config does not say."""
    tied = text_config(config).get("tie_word_embeddings")
    return tied if isinstance(tied, bool) else None


def context_length(config: Mapping[str, Any]) -> int | None:
    """How many positions the model was made for, or None where its config does not say."""
    text = text_config(config)
    length = text.get("max_position_embeddings")
    if not isinstance(length, int) or length < 1:
        return None
    if isinstance(scaling := text.get("rope_scaling"), Mapping):
        trained, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
        # Some configs already give the stretched length (Llama 3), some the trained one (Qwen).
        if is_int(trained, length) and is_number(factor):
            return int(trained * factor)
    return length


def dtype_name(dtype: mx.Dtype) -> str:
    """A dtype as people and configs write it: ``float32``."""
    return str(dtype).removeprefix("mlx.core.")


def skeleton(config: Mapping[str, Any]) -> nn.Module:
    """mlx-lm's model for a config, without weights: its arrays are not to be evaluated."""
    model_class, arguments = _get_classes(dict(config))
    return model_class(arguments.from_dict(dict(config)))


def quantized(
    model: nn.Module, config: dict[str, Any], group_size: int | None, bits: int | None, **how: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's ``quantize_model``, which prints how many bits it took, in silence."""
    with redirect_stdout(io.StringIO()):
        return quantize_model(model, config, group_size, bits, **how)


def has_quantized_layers(model: nn.Module) -> bool:
    """Whether any layer of a model is quantized."""
    return any(path.endswith(".scales") for path, _ in tree_flatten(model.parameters()))


def find_embedding(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The one table that turns token ids into embeddings: its path in the model, and the module.

    A second one, looked up by token id as well (gemma3n's and gemma4's per-layer inputs, n-gram
    embeddings), could not read a virtual id.
    """
    tables = _tables(model)
    if not tables:
        raise ModelError(f"{name} has no embedding table that this release knows how to wrap")
    if len(tables) > 1:
        raise ModelError(
            f"{name} looks token ids up in {len(tables)} tables ({', '.join(sorted(tables))}), so "
            "a merged block cannot stand for a token: use a base model with a single embedding "
            "table"
        )
    return next(iter(tables.items()))


def table_rows(model: nn.Module) -> int:
    """How many token ids a model's embedding table has rows for."""
    return max(table.weight.shape[0] for table in _tables(model).values())


def _tables(model: nn.Module) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        and (last := path.rsplit(".", 1)[-1]) != "wpe"
        and "position" not in last
    }


def digests(path: Path) -> tuple[str, str]:
    """SHA-256 sums by which what is stored knows the base model in a folder again.

    The first one, which is stored, is of the config as mlx-lm reads it and of every byte of the
    weights (and of Python files): it is not cheaper than reading them, as loading does too, and
    nothing less notices every change. The second one is what 0.1.0 stored: samples of the weights.
    """
    try:
        whole = hashlib.sha256(json.dumps(load_config(path), sort_keys=True).encode())
        weights = sorted(path.glob("*.safetensors"))
        for file in (*weights, *sorted(path.glob("*.py"))):
            whole.update(f"\n{file.name} {files.digest(file)}".encode())
        return whole.hexdigest(), _sampled(weights)
    except LOAD_ERRORS as error:
        raise ModelError(f"cannot read {path}: {first_line(error)}") from None


def _sampled(weights: Sequence[Path]) -> str:
    """Of the name and length of each file, its beginning (the header), and 64 samples of it."""
    digest, samples, size = hashlib.sha256(), 64, 1 << 16
    for file in weights:
        length = file.stat().st_size
        digest.update(f"{file.name} {length}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(size))
            for i in range(samples):
                opened.seek(length * i // samples)
                digest.update(opened.read(size))
    return digest.hexdigest()
