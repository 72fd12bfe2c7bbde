"""What the server answers, in OpenAI's JSON: completions, chunks of a stream, errors.

Source: https://platform.openai.com/docs/api-reference, guides/error-codes
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, Response, ToolCallFormatter
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kmerge_mlx.errors import BlockTableFullError, KMergeError

if TYPE_CHECKING:
    from kmerge_mlx.serving.requests import Completion

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LOWEST = -9999.0  # OpenAI's log-probability of an impossible token: JSON has no minus infinity
_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level tokenizers


class ApiError(Exception):
    """An answer that is an error; ``param`` is the field to blame, ``code`` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.param, self.code = param, code

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, other)
        named = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": named}


class ClientGone(Exception):
    """The client left, or does not read its answer."""


def busy(status: int, message: str, code: str) -> ApiError:
    """The answer to a request that may succeed later."""
    return ApiError(status, message, code=code, headers={"Retry-After": "1"})


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as an answer; an unforeseen one is a 500 without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BlockTableFullError):
        message = "the prompts have more blocks at once than the server has slots: try again"
        return busy(503, message, "blocks_exhausted")
    if isinstance(error, KMergeError):
        return ApiError(400, str(error).replace("`", ""))
    return ApiError(500, "the server failed to answer: its log says why", code="internal_error")


def event(value: dict[str, Any]) -> str:
    """A piece of a stream."""
    return f"data: {json.dumps(value)}\n\n"


class Answer:
    """The answer to one request, made from mlx-lm's tokens as they come; pieces have ``known``."""

    def __init__(
        self, completion: Completion, context: GenerationContext, tokenizer: Any, known: dict
    ):
        self._chat, self._stream = completion.chat, completion.stream
        self._stops, self._top = completion.stop, completion.top
        self._text = ""
        name, kind = ("chatcmpl", "chat.completion") if self._chat else ("cmpl", "text_completion")
        kind += ".chunk" if self._chat and self._stream else ""
        self._head = {"id": f"{name}-{uuid.uuid4()}", "object": kind, "created": int(time.time())}
        self._head |= known
        self._tokenizer = tokenizer
        self._previous = context.initial_state
        self._state = context.text_sm.make_state(self._previous)
        tools = completion.offered_tools if self._chat else None
        self._format_calls = ToolCallFormatter(context.tool_parser, tools, self._stream)
        self._unsent = defaultdict(str)  # text by mlx-lm's state: normal, reasoning, tool
        self._calls: list[str] = []
        self._called = False
        self._tokens: list[Response] = []
        self.finish_reason: str | None = None

    def add(self, response: Response) -> None:
        """Takes a token in; the answer has ended when :attr:`finish_reason` is set."""
        self._tokens.append(response)
        text, stopped = self._until_stop(response.text)
        finish = "stop" if stopped else response.finish_reason
        self._state, pieces = TextStateMachine.split(self._state, text)
        if finish == "length":
            self._state, rest, state = TextStateMachine.flush(self._state)
            pieces.append((state, rest))
        for state, piece in pieces:
            if state == "normal" and self._previous == "tool":
                self._end_call()
            self._unsent[state] += piece
            self._previous = state
        if finish is not None and self._previous == "tool" and self._unsent["tool"]:
            self._end_call()
        self.finish_reason = "tool_calls" if finish == "stop" and self._called else finish

    def _until_stop(self, text: str) -> tuple[str, bool]:
        """A token's text up to the first stop text, and whether there is one.

        mlx-lm looks for a stop text's tokens; here the same text in other tokens counts too.
        """
        self._text, before = self._text + text, len(self._text)
        found = [(self._text.find(s, max(0, before - len(s) + 1)), len(s)) for s in self._stops]
        end = min((place + size for place, size in found if place >= 0), default=None)
        return self._text[before:end], end is not None

    def _end_call(self) -> None:
        self._calls.append(self._unsent["tool"])
        self._unsent["tool"], self._called = "", True

    def chunk(self) -> dict[str, Any] | None:
        """What has come since the last chunk, or None where there is nothing to send yet."""
        new = self._unsent["normal"] or self._unsent["reasoning"] or self._calls
        ready = self.finish_reason is not None or (new and self._previous != "tool")
        return self.rest() if ready else None

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for it."""
        return self._head | {"choices": [], "usage": usage}

    def rest(self) -> dict[str, Any]:
        """All that has come since the last chunk: without one, the whole answer."""
        calls = self._format_calls(self._calls)
        text, reasoning = self._unsent["normal"], self._unsent["reasoning"]
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish_reason}
        if not self._chat:
            choice["text"] = text
        else:
            message = {"role": "assistant", "content": text, "reasoning": reasoning}
            message |= {"tool_calls": calls}
            message = {name: value for name, value in message.items() if value}
            if not self._stream:  # OpenAI's content is null beside tool calls alone
                message["content"] = text or (None if calls else "")
            choice["delta" if self._stream else "message"] = message
        if self._top is not None:
            made = _chat_logprobs(self._tokens, self._tokenizer, self._top)
            choice["logprobs"] = (
                {"content": made} if self._chat else _text_logprobs(made, self._top)
            )
        self._unsent["normal"] = self._unsent["reasoning"] = ""
        self._calls, self._tokens = [], []
        return self._head | {"choices": [choice]}


def _chat_logprobs(tokens: Sequence[Response], tokenizer: Any, top: int) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, data = _token(tokenizer, token)
        logprob = max(logprob, _LOWEST)
        return {"token": text, "logprob": logprob, "bytes": list(data), "id": token}

    made = []
    for response in tokens:
        # mlx-lm lists them in any order.
        likeliest = sorted(response.top_tokens, key=lambda likely: -likely["logprob"])[:top]
        others = [entry(likely["id"], likely["logprob"]) for likely in likeliest]
        made.append(entry(response.token, response.logprob) | {"top_logprobs": others})
    return made


def _text_logprobs(tokens: list[dict[str, Any]], top: int) -> dict[str, Any]:
    likeliest = [{t["token"]: t["logprob"] for t in one["top_logprobs"]} for one in tokens]
    return {
        "tokens": [one["token"] for one in tokens],
        "token_logprobs": [one["logprob"] for one in tokens],
        "top_logprobs": likeliest if top else None,
    }


def _token(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """A token's text and bytes; a part of a character is written ``bytes:\\xf0\\x9f``."""
    text = tokenizer.decode([token])
    piece = tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" not in text:
        return text or piece or "", text.encode("utf-8")
    if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece or ""):
        data = bytes([int(found[1], 16)])
    elif piece and all(c in _BYTE_OF for c in piece):
        data = bytes(_BYTE_OF[c] for c in piece)
    else:
        return text, text.encode("utf-8")
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
