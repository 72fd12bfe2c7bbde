"""Log-probabilities of an answer's tokens in OpenAI's two forms.

Source: https://platform.openai.com/docs/api-reference (chat: ``content``; completions: lists).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mlx_lm.server import Response

_LOWEST = -9999.0
"""What OpenAI writes for a token that cannot be: minus infinity is no JSON."""


def chat_logprobs(tokens: Sequence[Response], tokenizer: Any, top: int) -> dict[str, Any]:
    """For a conversation.

    Args:
        tokens: mlx-lm's responses.
        tokenizer: Its tokenizer.
        top: How many of the likeliest tokens to name at each place.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, data = _token(tokenizer, token)
        known = {"token": text, "logprob": max(logprob, _LOWEST)}
        return known | {"bytes": list(data), "id": token}

    content = []
    for response in tokens:
        likeliest = [entry(t["id"], t["logprob"]) for t in _sorted(response, top)]
        content.append(entry(response.token, response.logprob) | {"top_logprobs": likeliest})
    return {"content": content}


def text_logprobs(tokens: Sequence[Response], tokenizer: Any, top: int) -> dict[str, Any]:
    """For a completion; see :func:`chat_logprobs`."""
    likeliest = [
        {_token(tokenizer, t["id"])[0]: max(t["logprob"], _LOWEST) for t in _sorted(r, top)}
        for r in tokens
    ]
    return {
        "tokens": [_token(tokenizer, response.token)[0] for response in tokens],
        "token_logprobs": [max(response.logprob, _LOWEST) for response in tokens],
        "top_logprobs": likeliest if top else None,
    }


def _sorted(response: Response, top: int) -> list[dict[str, Any]]:
    """mlx-lm finds the likeliest tokens, in no order."""
    return sorted(response.top_tokens, key=lambda t: -t["logprob"])[:top]


def _token(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """A token's text and bytes; one that is no whole character is written ``bytes:\\xf0\\x9f``."""
    text = tokenizer.decode([token])
    piece = tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" not in text:
        return text or piece or "", text.encode("utf-8")
    if found := _BYTE.fullmatch(piece or ""):
        data = bytes([int(found[1], 16)])
    elif piece and all(c in _BYTE_OF for c in piece):
        data = bytes(_BYTE_OF[c] for c in piece)
    else:
        return text, text.encode("utf-8")
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with (GPT-2's: those that print are kept).

    Source: https://huggingface.co/docs/tokenizers/api/pre-tokenizers (ByteLevel).
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTE_OF = _byte_letters()
