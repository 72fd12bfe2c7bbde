"""What the server answers, in OpenAI's JSON: completions, chunks of a stream, errors.

Source: https://platform.openai.com/docs/api-reference, guides/error-codes
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.server import GenerationContext, Response, ToolCallFormatter

from kmerge_mlx.errors import BlockTableFullError, KMergeError, first_line
from kmerge_mlx.serving.expand import NAME

if TYPE_CHECKING:
    from kmerge_mlx.detokenizer import Detokenizer
    from kmerge_mlx.serving.requests import Completion

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LOWEST = -9999.0  # OpenAI's log-probability of an impossible token: JSON has no minus infinity
_log = logging.getLogger(__name__)


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


def body_too_large(most: int) -> ApiError:
    """The answer to a body of more bytes than that."""
    message = f"the body is larger than the {most:,} bytes that the server takes"
    return ApiError(413, message, code="body_too_large")


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
    """The answer to one prompt, made from mlx-lm's tokens as they come.

    Text is held back only while it may be the beginning of a stop text, or of a marker of thinking
    or of a tool call.

    Args:
        completion: The request.
        context: What mlx-lm says of it before its first token.
        tokenizer: The tokenizer.
        index: Which of the request's prompts it answers.
    """

    def __init__(
        self, completion: Completion, context: GenerationContext, tokenizer: Any, index: int = 0
    ):
        self._chat, self._stream = completion.chat, completion.stream
        self._stops, self._top, self._index = completion.stop, completion.top, index
        self._tokenizer = tokenizer
        tools = completion.offered_tools if self._chat else None
        self._format_calls = ToolCallFormatter(context.tool_parser, tools, self._stream)
        self._unsent = defaultdict(str)  # text by mlx-lm's state: normal, reasoning, tool
        self._calls: list[dict[str, Any]] = []
        self._called, self._begun = 0, False
        self._tokens: list[Response] = []
        self.finish_reason: str | None = None
        self.expansions = 0  # times that the model asked for text
        self.begin(completion, context)

    def begin(self, completion: Completion, context: GenerationContext) -> None:
        """Begins the answer, or goes on with it: what the model asked for is in the prompt now."""
        self._detokenizer, self._maybe_stop = self._tokenizer.detokenizer, ""
        self._previous = context.initial_state
        markers = make_text_state_machine(self._tokenizer) if self._chat else TextStateMachine()
        self._state = markers.make_state(self._previous)
        self._rounds = completion.rounds if self._chat else None
        self.said = defaultdict(str)  # since then, by mlx-lm's state
        self.asked: list[dict[str, Any]] = []  # calls of expand, which the client does not see
        self.expanding, self._shown = False, len(self._tokens)  # tokens whose text is out

    @property
    def over(self) -> bool:
        """Whether it has ended, or has to go on with another prompt, by :meth:`begin`."""
        return self.finish_reason is not None or self.expanding

    def add(self, response: Response, more: bool = True) -> None:
        """Takes a token in; ``more``: the client allows further ones."""
        self._tokens.append(response)
        finish = response.finish_reason
        if finish != "stop" or response.token not in self._tokenizer.eos_token_ids:
            self._detokenizer.add_token(response.token)
        if self._take(last=finish is not None):
            finish = "stop"
        if finish == "stop" and self._called:
            finish = "tool_calls"
        held = self._previous == "tool" or self._state[3] or self._maybe_stop
        if self.asked:
            del self._tokens[self._shown :]
        elif not held:
            self._shown = len(self._tokens)
        if finish == "stop" and self.asked and self._rounds:
            self.expanding, finish = more, None if more else "length"
        self.finish_reason = finish

    def let_go(self) -> None:
        """Lets go of the text that is held back, where no more tokens come."""
        self._take(last=True)

    def _take(self, last: bool) -> bool:
        """Takes in the text of new tokens, and says whether a stop text ended it."""
        if last:
            self._detokenizer.finalize()
        text, stopped = self._until_stop(self._detokenizer.last_segment, last)
        self._state, pieces = TextStateMachine.split(self._state, text)
        if last or stopped:
            self._state, rest, state = TextStateMachine.flush(self._state)
            pieces.append((state, rest))
        for state, piece in pieces:
            if state == "normal" and self._previous == "tool":
                self._end_call(closed=True)
            if not self.asked or state == "tool":  # what follows was written without the text
                self._unsent[state] += piece
                self.said[state] += piece
            self._previous = state
        if (last or stopped) and self._previous == "tool":
            self._end_call()
        return stopped

    def _until_stop(self, text: str, last: bool) -> tuple[str, bool]:
        """The text up to the first stop text, in whatever tokens, and whether there is one."""
        text = self._maybe_stop + text
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, stop = min(found, key=lambda one: (one[0], -len(one[1])))
            self._maybe_stop = ""
            return text[: end - len(stop)], True
        begun = (n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n]))
        end = len(text) - (0 if last else max(begun, default=0))
        self._maybe_stop = text[end:]
        return text[:end], False

    def _end_call(self, closed: bool = False) -> None:
        """A tool call, or the text that the model wrote in the place of one."""
        text, self._unsent["tool"], self._previous = self._unsent["tool"], "", "normal"
        if calls := self._read_calls(text):
            for call in calls:
                if self._rounds is not None and call["function"]["name"] == NAME:
                    self.asked.append(call)
                    continue
                self._calls.append(call | ({"index": self._called} if self._stream else {}))
                self._called += 1
        elif text and not self.asked:
            end = self._tokenizer.tool_call_end if closed else ""
            text = f"{self._tokenizer.tool_call_start}{text}{end or ''}"
            self._unsent["normal"] += text
            self.said["normal"] += text

    def _read_calls(self, text: str) -> list[dict[str, Any]]:
        try:
            calls = self._format_calls([text])
            named = all(isinstance(call["function"]["name"], str) for call in calls)
        except Exception as error:  # mlx-lm's parsers raise anything over what a model wrote
            _log.debug("a tool call could not be read: %r", first_line(error))
            return []
        return calls if named else []

    def chunk(self) -> dict[str, Any] | None:
        """What has come since the last chunk, or None where there is nothing to send yet."""
        new = self._unsent["normal"] or self._unsent["reasoning"] or self._calls
        ready = self.finish_reason is not None or (new and self._previous != "tool")
        return self.rest() if ready else None

    def rest(self) -> dict[str, Any]:
        """All that has come since the last chunk, as a choice: without one, the whole answer."""
        text, reasoning = self._unsent["normal"], self._unsent["reasoning"]
        choice: dict[str, Any] = {"index": self._index, "finish_reason": self.finish_reason}
        if not self._chat:
            choice["text"] = text
        else:
            role = "" if self._stream and self._begun else "assistant"
            message = {"role": role, "content": text, "reasoning": reasoning}
            message |= {"tool_calls": self._calls}
            message = {name: value for name, value in message.items() if value}
            if not self._stream:  # OpenAI's content is null beside tool calls alone
                message["content"] = text or (None if self._calls else "")
            choice["delta" if self._stream else "message"] = message
        if self._top is not None:
            made = _chat_logprobs(self._tokens, self._detokenizer, self._top)
            choice["logprobs"] = (
                {"content": made} if self._chat else _text_logprobs(made, self._top)
            )
        self._unsent["normal"] = self._unsent["reasoning"] = ""
        self._calls, self._tokens, self._shown, self._begun = [], [], 0, True
        return choice


def head_of(completion: Completion, known: dict[str, Any]) -> dict[str, Any]:
    """What an answer, or every chunk of a stream, begins with."""
    name, kind = ("chatcmpl", "chat.completion") if completion.chat else ("cmpl", "text_completion")
    kind += ".chunk" if completion.chat and completion.stream else ""
    head = {"id": f"{name}-{uuid.uuid4()}", "object": kind, "created": int(time.time())}
    return head | known


def _chat_logprobs(
    tokens: Sequence[Response], detokenizer: Detokenizer, top: int
) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, data = detokenizer.spell(token)
        logprob = max(_LOWEST, logprob)
        return {"token": text, "logprob": logprob, "bytes": list(data), "id": token}

    made = []
    for response in tokens:
        # mlx-lm lists them in any order.
        likeliest = sorted(response.top_tokens, key=lambda likely: -likely["logprob"])[:top]
        others = [entry(likely["id"], likely["logprob"]) for likely in likeliest]
        made.append(entry(response.token, response.logprob) | {"top_logprobs": others})
    return made


def _text_logprobs(tokens: list[dict[str, Any]], top: int) -> dict[str, Any]:
    return {
        "tokens": [one["token"] for one in tokens],
        "token_logprobs": [one["logprob"] for one in tokens],
        "top_logprobs": [_by_text(one) for one in tokens] if top else None,
    }


def _by_text(token: dict[str, Any]) -> dict[str, float]:
    """The likeliest tokens by their text; of two with one text, one is called by its id."""
    owners = {token["token"]: token["id"]}
    for likely in token["top_logprobs"]:
        owners.setdefault(likely["token"], likely["id"])

    def key(likely: dict[str, Any]) -> str:
        text, number = likely["token"], likely["id"]
        return text if owners[text] == number else f"token_id:{number}"

    return {key(likely): likely["logprob"] for likely in token["top_logprobs"]}
