"""A request's body: JSON to settings that mlx-lm's server can be given as they are.

Owns: every check of what clients send, so that nothing past this file meets a value that it cannot
take. Does not know sockets, tokenizers or models (but how many token ids there are).

Source: https://platform.openai.com/docs/api-reference, and the fields ``mlx_lm.server`` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kmerge_mlx.config import is_int
from kmerge_mlx.errors import first_line, short
from kmerge_mlx.serving.answers import ApiError, refused

DEFAULT_MODEL = "default_model"
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_TOP_LOGPROBS = 11
COLDEST = 1e-3
"""A temperature below is greedy: half precision could not hold the logits."""

_INT32 = 2**31 - 1
# Lowest and highest; mlx-lm takes much more, and some of that makes NaN or ends its thread.
_NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 0.5),
}
_WHOLE = {
    "max_tokens": (1, _INT32),
    "max_completion_tokens": (1, _INT32),
    "repetition_context_size": (1, _INT32),
    "presence_context_size": (1, _INT32),
    "frequency_context_size": (1, _INT32),
    "seed": (0, 2**64 - 1),
}
# What is loaded is chosen at start-up, and what changes the meaning of an answer is not ignored.
_REFUSED = ("adapters", "adapter", "draft_model", "num_draft_tokens", "role_mapping", "suffix")
_ONLY = {"n": 1, "best_of": 1, "echo": False}
_TEMPLATE_OWN = (
    *("conversation", "chat_template", "tools", "tokenize", "add_generation_prompt", "padding"),
    *("continue_final_message", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "messages", "self"),
)


@dataclass(frozen=True)
class Completion:
    """A checked request.

    Args:
        options: What mlx-lm's server reads of a body; the model is the served one.
        messages: A conversation, or None.
        prompt: A text, or token ids; None for a conversation.
        merge: What a completion says of all of its prompt.
        template_options: Further arguments of the chat template.
    """

    options: dict[str, Any]
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    merge: bool | None = None
    template_options: Mapping[str, Any] | None = None


def read_body(raw: bytes) -> dict[str, Any]:
    """A body's bytes as a JSON object.

    Raises:
        ApiError: 400: not UTF-8, not JSON, no object, NaN, or text that is no Unicode.
    """

    try:
        body = _loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise refused(f"the body is not JSON: {first_line(error)}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise refused(f"the body is a JSON {type(body).__name__}, expected an object")
    return body


def _loads(text: str) -> Any:
    """JSON as its standard has it.

    Raises:
        ValueError: It is none, or holds NaN, or half of a surrogate pair, which is no text.
        RecursionError: It is nested too deeply.
    """

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    value = json.loads(text, parse_constant=no_number)
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return value


def read_completion(
    body: Mapping[str, Any], chat: bool, served: str, vocab_size: int
) -> Completion:
    """Checks a request.

    Args:
        body: Its JSON object.
        chat: Whether it came to the chat endpoint.
        served: Name of the only model there is.
        vocab_size: V: token ids are below.

    Raises:
        ApiError: 400 for the first field that cannot be; 404 for another model.
    """
    body = {name: value for name, value in body.items() if value is not None}
    _check_model(body, served)
    for name in _REFUSED:
        if name in body:
            raise refused(f"{name} is not supported: what is served was chosen at start-up", name)
    for name, only in _ONLY.items():
        if body.get(name, only) != only:
            raise refused(f"{name} is {short(body[name])}, but only {only} is supported", name)
    if _typed(body, "response_format", dict, {}).get("type", "text") != "text":
        raise refused("only text is supported", "response_format")
    options = {"model": served} | _sampling(body, vocab_size) | _logprobs(body, chat)
    options |= {"stop": _stops(body), "stream": _typed(body, "stream", bool, False)}
    options["stream_options"] = _stream_options(body)
    if not chat:
        prompt, merge = _prompt(body, vocab_size), _typed(body, "merge", bool, None)
        return Completion(options, prompt=prompt, merge=merge)
    if (tools := _tools(body)) is not None:
        options["tools"] = tools
    return Completion(
        options, messages=_messages(body), template_options=_template_options(body, tools)
    )


def _check_model(body: Mapping[str, Any], served: str) -> None:
    name = _typed(body, "model", str, served)
    if name not in (served, DEFAULT_MODEL):
        raise ApiError(
            404,
            f"the model {short(name)} is not served here, only {served} is",
            param="model",
            code="model_not_found",
        )


def _typed(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name, default)
    if value is not default and not isinstance(value, kind):
        raise refused(f"{name} is {short(value)}, expected {_article(kind)}", name)
    return value


def _article(kind: type) -> str:
    names = {str: "a text", bool: "true or false", dict: "an object", list: "a list"}
    return names[kind]


def _sampling(body: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _NUMBERS.keys() & body:
        value, (low, high) = body[name], _NUMBERS[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or not math.isfinite(value):
            raise refused(f"{name} is {short(value)}, expected {low:g} to {high:g}", name)
        found[name] = float(value)
    for name, (low, high) in {**_WHOLE, "top_k": (0, vocab_size - 1)}.items():
        if name not in body:
            continue
        if not is_int(body[name], low) or body[name] > high:
            whole = f"a whole number of {low} to {high}"
            raise refused(f"{name} is {short(body[name])}, expected {whole}", name)
        found[name] = body[name]
    if found.get("temperature", 1.0) < COLDEST:
        found["temperature"] = 0.0
    if 0 < found.get("repetition_penalty", 1.0) < 0.01:
        raise refused("repetition_penalty is below 0.01: 0 and 1 are off", "repetition_penalty")
    if "logit_bias" in body:
        found["logit_bias"] = _logit_bias(body, vocab_size)
    return found


def _logit_bias(body: Mapping[str, Any], vocab_size: int) -> dict[str, float]:
    biases: dict[str, float] = {}
    for token, bias in _typed(body, "logit_bias", dict, {}).items():
        known = token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not known:
            raise refused(f"{short(token)} is no token id below {vocab_size}", "logit_bias")
        if not number or not -100 <= bias <= 100:
            raise refused(f"a bias is {short(bias)}, expected -100 to 100", "logit_bias")
        biases[str(int(token))] = float(bias)
    return biases


def _logprobs(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """``logprobs`` and ``top_logprobs`` as mlx-lm takes them; a completion's is a number."""
    wanted, top = body.get("logprobs", False), body.get("top_logprobs", 0)
    if not chat and is_int(wanted):
        wanted, top = True, wanted
    if not isinstance(wanted, bool):
        raise refused(f"logprobs is {short(wanted)}, expected true or false", "logprobs")
    if not is_int(top) or top > MAX_TOP_LOGPROBS:
        name = "top_logprobs" if "top_logprobs" in body else "logprobs"
        raise refused(f"{name} is {short(top)}, expected 0 to {MAX_TOP_LOGPROBS}", name)
    return {"logprobs": wanted or top > 0, "top_logprobs": top or -1}


def _stops(body: Mapping[str, Any]) -> list[str]:
    stops = body.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
        limits = f"up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters"
        raise refused(f"stop is {short(stops)}, expected {limits}", "stop")
    return stops


def _stream_options(body: Mapping[str, Any]) -> dict[str, bool]:
    options = _typed(body, "stream_options", dict, {})
    if options and body.get("stream") is not True:
        raise refused("stream_options needs stream: true", "stream_options")
    usage = options.get("include_usage") or False
    if not isinstance(usage, bool):
        raise refused(f"include_usage is {short(usage)}, expected a bool", "stream_options")
    return {"include_usage": usage}


def _prompt(body: Mapping[str, Any], vocab_size: int) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not is_int(prompt[0]):
        prompt = prompt[0]  # a list of prompts, of which one can be answered
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(map(is_int, prompt))):
        if not prompt:
            raise refused("prompt is empty: there is nothing to read", "prompt")
        if not isinstance(prompt, str) and max(prompt) >= vocab_size:
            raise refused(f"prompt holds a token id that is not below {vocab_size}", "prompt")
        return prompt
    raise refused("prompt is missing, or no text, list of token ids, or list of one", "prompt")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise refused("messages is missing, or no list of messages", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refused(f"{name} is no object with a role", name)
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise refused(f"{name}: content is no text and no list of parts", name)
    # Templates write an absent text as "None".
    read = message | {"content": "" if content is None else content}
    if (calls := message.get("tool_calls")) is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise refused(f"{name}: tool_calls is no list of objects", name)
        read["tool_calls"] = [_tool_call(call, name) for call in calls]
    return read


def _tool_call(call: dict[str, Any], name: str) -> dict[str, Any]:
    """A call whose arguments are an object, as templates take them, not the text of one."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = _loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise refused(
            f"{name}: a tool call's arguments are not JSON: {first_line(error)}", name
        ) from None
    return call | {"function": function | {"arguments": arguments}}


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools, choice = _typed(body, "tools", list, []), body.get("tool_choice", "auto")
    if not all(isinstance(tool, dict) for tool in tools):
        raise refused("tools is no list of objects", "tools")
    if choice not in ("auto", "none"):
        raise refused("only auto and none are supported", "tool_choice")
    return tools if tools and choice == "auto" else None


def _template_options(body: Mapping[str, Any], tools: list[Any] | None) -> dict[str, Any]:
    options = _typed(body, "chat_template_kwargs", dict, {})
    if own := [name for name in _TEMPLATE_OWN if name in options]:
        raise refused(f"chat_template_kwargs may not hold {own[0]}", "chat_template_kwargs")
    return options | ({"tools": tools} if tools else {})
