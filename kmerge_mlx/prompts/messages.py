"""Makes messages alike, whichever client or data set wrote them.

Source: https://platform.openai.com/docs/api-reference/chat, and what chat templates take of it
(https://huggingface.co/docs/transformers/chat_templating, /chat_extras).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kmerge_mlx.errors import PromptError, short

ROLES = ("system", "user", "assistant", "tool")
"""Roles that templates know; ``developer`` is OpenAI's newer word for ``system``."""

_EMPTY_ROLES = ("assistant", "tool")  # their content may be null


def normalised(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """Messages as chat templates take them, whatever they came from.

    Entries that are null are left out, ``developer`` is ``system``, a missing content of a model
    or a tool is empty, ``refusal`` is a content, ``function_call`` is a tool call, arguments of
    tool calls are objects, and parts are mappings with a text.
    Messages that are so already stay as they are.

    Args:
        messages: A list of them, of JSON.
        name: What to call it in an error.

    Raises:
        PromptError: Not a list of messages, an unknown role, or a content that is not text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise _wrong(name, messages, "a list of messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _wrong(where: str, value: Any, expected: str) -> PromptError:
    return PromptError(f"{where} is {short(value)}, expected {expected}", field=where)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(where, message, "an object with role and content")
    kept = {name: value for name, value in message.items() if value is not None}
    role = "system" if kept.get("role") == "developer" else kept.get("role")
    if role not in ROLES:
        raise _wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    content = kept.get("content", "" if role in _EMPTY_ROLES else None)
    if (refusal := kept.pop("refusal", "")) != "":  # OpenAI's place for an answer that refuses
        if content != "" or not isinstance(refusal, str):
            raise _wrong(f"{where}.refusal", refusal, "text in place of a content")
        content = refusal
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    elif not isinstance(content, str):
        raise _wrong(f"{where}.content", content, "text or a list of parts")
    if not isinstance(merge := kept.get("merge"), bool | None):
        raise _wrong(f"{where}.merge", merge, "true or false")
    kept |= {"role": role, "content": content}
    if calls := kept.pop("tool_calls", None):
        if not isinstance(calls, list | tuple):
            raise _wrong(f"{where}.tool_calls", calls, "a list of calls")
        kept["tool_calls"] = [_call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]
    if (call := kept.pop("function_call", None)) is not None:  # what OpenAI had before tool_calls
        called = {"type": "function", "function": _call(call, f"{where}.function_call")}
        kept["tool_calls"] = [*kept.get("tool_calls", ()), called]
    return kept


def _part(part: Any, where: str) -> dict[str, Any]:
    """A text part; one that is bare text, as some data sets have it, too."""
    kept = {"text": part} if isinstance(part, str) else part
    if not isinstance(kept, Mapping) or kept.get("type", "text") != "text":
        raise _wrong(where, part, "a text part, {type: text, text: ...}")
    if not isinstance(kept.get("text"), str):
        raise _wrong(f"{where}.text", kept.get("text"), "text")
    if not isinstance(merge := kept.get("merge"), bool | None):
        raise _wrong(f"{where}.merge", merge, "true or false")
    return {"type": "text"} | {name: value for name, value in kept.items() if value is not None}


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in OpenAI's form, or its function alone, as some data sets have it."""
    if not isinstance(call, Mapping):
        raise _wrong(where, call, "an object with a function")
    kept = {name: value for name, value in call.items() if value is not None}
    wrapped = "function" in kept
    where += ".function" * wrapped
    function = kept["function"] if wrapped else kept
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _wrong(where, function, "an object with name and arguments")
    found = dict(function) | {"arguments": _arguments(function.get("arguments"), where)}
    return kept | {"function": found} if wrapped else found


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """A tool call's arguments: OpenAI writes their JSON as text, and templates take an object."""
    from pydantic_core import from_json

    found = value
    if isinstance(value, str):
        try:
            found = from_json(value.strip() or "{}", allow_inf_nan=False)
        except ValueError:
            found = None
    found = {} if value is None else found
    if not isinstance(found, Mapping):
        raise _wrong(f"{where}.arguments", value, "a JSON object, or its text")
    return dict(found)
