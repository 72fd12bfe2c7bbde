"""Log-probabilities of an answer's tokens in OpenAI's two forms.

Source: https://platform.openai.com/docs/api-reference (chat: ``content``; completions: lists).
"""

from __future__ import annotations

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
        text = tokenizer.decode([token])
        known = {"token": text, "logprob": max(logprob, _LOWEST)}
        return known | {"bytes": list(text.encode("utf-8")), "id": token}

    content = []
    for response in tokens:
        likeliest = [entry(t["id"], t["logprob"]) for t in _sorted(response, top)]
        content.append(entry(response.token, response.logprob) | {"top_logprobs": likeliest})
    return {"content": content}


def text_logprobs(tokens: Sequence[Response], tokenizer: Any, top: int) -> dict[str, Any]:
    """For a completion; see :func:`chat_logprobs`."""
    likeliest = [
        {tokenizer.decode([t["id"]]): max(t["logprob"], _LOWEST) for t in _sorted(r, top)}
        for r in tokens
    ]
    return {
        "tokens": [tokenizer.decode([response.token]) for response in tokens],
        "token_logprobs": [max(response.logprob, _LOWEST) for response in tokens],
        "top_logprobs": likeliest if top else None,
    }


def _sorted(response: Response, top: int) -> list[dict[str, Any]]:
    """mlx-lm finds the likeliest tokens, in no order."""
    return sorted(response.top_tokens, key=lambda t: -t["logprob"])[:top]
