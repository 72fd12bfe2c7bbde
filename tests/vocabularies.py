"""Small tokenizers of every kind of decoder, and random bases that have one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from tests.conftest import UPSTREAM
from tests.tiny import qwen2_config, write_base

STEPS = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
SENTENCEPIECE = decoders.Sequence([*STEPS, decoders.Strip(" ", 1, 0)])
PIECES = ["\u2581", "\u2581t", "t", "\u2581the", "a", "\u2581a", "\u00e9", "\ufffd", "\n", "##s"]


def sentencepiece(decoder: Any = SENTENCEPIECE) -> Tokenizer:
    """As Llama 2's: pieces with a visible space, and tokens for the bytes of other characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    spaces = normalizers.Replace(" ", "\u2581")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
    made.decoder = decoder
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def byte_level(decoder: Any = None) -> Tokenizer:
    """The fixture's tokenizer."""
    made = Tokenizer.from_file(str(UPSTREAM / "base" / "tokenizer.json"))
    made.decoder = decoder or made.decoder
    return made


def tekken() -> Tokenizer:
    """A byte-level vocabulary with SentencePiece's decoder, as some tools convert Mistral's."""
    return byte_level(SENTENCEPIECE)


def base_with(folder: Path, tokenizer: Tokenizer, vocab_size: int, eos: str = "</s>") -> Path:
    """A random Llama whose table has ``vocab_size`` rows, more than the tokenizer has tokens."""
    config = qwen2_config(model_type="llama", vocab_size=vocab_size)
    write_base(folder, config | {"eos_token_id": tokenizer.token_to_id(eos)})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


MAKERS = {"byte level": byte_level, "sentencepiece": sentencepiece, "tekken": tekken}
"""A tokenizer of each kind."""

ENDS = {"byte level": "<|endoftext|>", "sentencepiece": "</s>", "tekken": "<|endoftext|>"}
"""The token that ends their answers."""
