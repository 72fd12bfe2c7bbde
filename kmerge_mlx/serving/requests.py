"""Requests as clients send them: OpenAI's fields, and a clear refusal of what is not supported.

Source: https://platform.openai.com/docs/api-reference, and the fields that ``mlx_lm.server`` reads.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, Strict, ValidationError, model_validator
from pydantic_core import from_json

from kmerge_mlx.config import is_int
from kmerge_mlx.errors import PromptError, first_line, short
from kmerge_mlx.prompts.messages import normalised
from kmerge_mlx.serving.answers import ApiError
from kmerge_mlx.serving.expand import TOOL

if TYPE_CHECKING:
    from kmerge_mlx.generation.structured import Grammar

DEFAULT_MODEL = "default_model"
MAX_TOP_LOGPROBS = 20

_BOM = b"\xef\xbb\xbf"
# A field that would change an answer is not ignored. These are of OpenAI, vLLM, llama.cpp, mlx-lm.
_UNSUPPORTED = (
    *("adapters", "adapter", "draft_model", "num_draft_tokens", "role_mapping", "suffix"),
    *("functions", "function_call", "audio", "modalities", "web_search_options"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    *("structural_tag", "json_schema", "grammar", "regex", "ebnf"),
    *("stop_token_ids", "bad_words", "allowed_token_ids", "min_tokens", "ignore_eos"),
    *("include_stop_str_in_output", "add_generation_prompt", "continue_final_message"),
    *("chat_template", "documents", "prompt_embeds", "truncate_prompt_tokens"),
    *("use_beam_search", "length_penalty", "typical_p", "mirostat"),
    *("repeat_penalty", "dry_multiplier", "skip_special_tokens", "logits_processors"),
    "prompt_logprobs",
)
# Their values that change nothing, where those are not empty; an empty schema means any JSON.
_NEUTRAL: dict[str, Any] = {"modalities": ["text"], "add_generation_prompt": True}
_NEUTRAL |= {"length_penalty": 1, "typical_p": 1, "repeat_penalty": 1}
_NEUTRAL |= {"skip_special_tokens": True, "guided_json": False, "json_schema": False}


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(is_int, value)))


def _prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a request, in a list also where there is one."""
    prompts = value if isinstance(value, list) and not _is_prompt(value) else [value]
    if not all(map(_is_prompt, prompts)):
        raise ValueError("expected text, a list of token ids, or a list of these")
    if not all(prompts):
        raise ValueError("the prompt is empty: there is nothing to read")
    return prompts


def _logprobs(value: Any) -> bool | int:
    if not isinstance(value, bool) and not (is_int(value) and value <= MAX_TOP_LOGPROBS):
        raise ValueError(f"expected true, false, or 0 to {MAX_TOP_LOGPROBS} for a completion")
    return value


def _template_options(value: Any) -> Any:
    if isinstance(value, dict) and "chat_template" in value:
        raise ValueError("chat_template cannot be chosen by a request")
    return value


class _Part(BaseModel, strict=True, allow_inf_nan=False):
    """A part of a request, in which a null is the same as a field that is left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept for name, kept in value.items() if kept is not None}
        return value


class _StreamOptions(_Part):
    include_usage: bool = False


class _JsonSchema(_Part):
    content: Annotated[dict[str, Any], Field(alias="schema")]
    name: str = ""
    description: str = ""
    strict: bool = False  # it is followed in any case


class _ResponseFormat(_Part, extra="forbid"):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected json_schema beside the type json_schema, and only there")
        return self


_MOST = 2**31 - 1
_Size = Annotated[int, Field(ge=1, le=_MOST)]
# LM Studio and llama.cpp write -1 for "as many as there is room for", vLLM -1 for "all of them".
_Answer = Annotated[_Size, BeforeValidator(lambda value: _MOST if value == -1 else value)]
_Count = Annotated[int, Field(ge=0), BeforeValidator(lambda value: 0 if value == -1 else value)]
_Token = Annotated[int, Strict(False), Field(ge=0)]
_ListOfOne = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(ge=-100, le=100)]


class Completion(_Part):
    """The fields that both endpoints have; mlx-lm takes wider ranges, and some end its thread."""

    chat: ClassVar[bool] = False
    model: str = DEFAULT_MODEL
    max_tokens: _Answer | None = None
    max_completion_tokens: _Answer | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    top_k: _Count | None = None
    seed: Annotated[int, Field(ge=-1, lt=2**64)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=100)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_context_size: _Size = 20
    presence_context_size: _Size = 20
    frequency_context_size: _Size = 20
    xtc_probability: _Share = 0.0
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    logit_bias: dict[_Token, _Penalty] | None = None
    logprobs: Annotated[Any, BeforeValidator(_logprobs)] = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    stop: Annotated[list[_Stop], Field(max_length=16), _ListOfOne] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    response_format: _ResponseFormat = _ResponseFormat(type="text")
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    merge: bool | None = None
    _grammar: Grammar | None = None

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is to fit."""
        form = self.response_format
        if form.json_schema is not None:
            return form.json_schema.content
        return {"type": "object"} if form.type == "json_object" else None

    @property
    def grammar(self) -> Grammar | None:
        """The compiled schema, once it is."""
        return self._grammar

    @grammar.setter
    def grammar(self, compiled: Grammar) -> None:
        self._grammar = compiled

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to list; None leaves log-probabilities out."""
        if self.logprobs is False and not self.top_logprobs:
            return None
        return max(0 if self.logprobs is True else self.logprobs, self.top_logprobs)


class TextCompletion(Completion):
    """A request to ``/v1/completions``."""

    prompt: Annotated[Any, BeforeValidator(_prompts)]


class ChatCompletion(Completion):
    """A request to ``/v1/chat/completions``."""

    chat: ClassVar[bool] = True
    messages: Annotated[list[dict[str, Any]], BeforeValidator(normalised)]
    logprobs: bool = False
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_template_options)] = {}
    _rounds: int | None = None

    @property
    def rounds(self) -> int | None:
        """How often the model may still call ``expand``; None: it is not for this request."""
        return self._rounds

    def expanding(self, rounds: int, *messages: dict[str, Any]) -> Self:
        """The same request with further messages, in which the model may call it so often."""
        made = self.model_copy(update={"messages": [*self.messages, *messages]})
        made._rounds = rounds
        return made

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call."""
        tools = [*self.tools, TOOL] if self._rounds else self.tools
        return tools if tools and self.tool_choice == "auto" else None

    @property
    def written(self) -> str:
        """All that a chat template is given."""
        given = (self.messages, self.tools, self.chat_template_kwargs)
        return json.dumps(given, ensure_ascii=False)


def read_json(raw: bytes) -> Any:
    """JSON as its standard has it: no NaN, no half of a surrogate pair."""
    collects = gc.isenabled()
    gc.disable()  # Python 3.11 searches millions of new lists again and again, and all threads wait
    try:
        return from_json(raw.removeprefix(_BOM), allow_inf_nan=False)
    finally:
        if collects:
            gc.enable()


def unknown_model(name: str, names: Mapping[str, str]) -> ApiError:
    """The refusal of a model that is not among the names, given with what clients are shown."""
    known = ", ".join(dict.fromkeys(names.values()))
    message = f"the model {short(name)} is not served here: expected {known}"
    return ApiError(404, message, "model", "model_not_found")


def read_completion(
    raw: bytes, chat: bool | None, names: Mapping[str, str], vocab_size: int
) -> Completion:
    """Reads and checks the body of a request to a model of these names; an ApiError names a field.

    ``names`` has, for each that a client may use, the one that it is shown. ``chat`` None: it is a
    conversation if it has messages.
    """
    try:
        body = read_json(raw)
    except ValueError as error:
        message = f"the body is not JSON: {first_line(error)}"
        raise ApiError(400, message, code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {short(body)}, expected a JSON object")
    _check_supported(body)
    chat = "messages" in body if chat is None else chat
    try:
        completion = (ChatCompletion if chat else TextCompletion).model_validate(body)
    except ValidationError as error:
        raise _as_api_error(error) from None
    except PromptError as error:
        raise ApiError(400, error.found, error.field) from None
    if completion.model not in names:
        raise unknown_model(completion.model, names)
    if chat and completion.offered_tools and completion.answer_schema is not None:
        message = "response_format does not go with tools: leave them out, or set tool_choice none"
        raise ApiError(400, message, "response_format")
    prompts = [p for p in getattr(completion, "prompt", ()) if not isinstance(p, str)]
    numbers = {"top_k": [completion.top_k or 0], "top_logprobs": [completion.top or 0]}
    numbers |= {"logit_bias": completion.logit_bias, "prompt": [max(ids) for ids in prompts]}
    for name, found in numbers.items():  # each indexes the logits
        if found and max(found) >= vocab_size:
            message = f"{name} has {max(found)}, expected less than {vocab_size}"
            raise ApiError(400, message, name)
    if 0 < completion.repetition_penalty < 0.01:
        raise ApiError(
            400, "repetition_penalty is below 0.01: 0 and 1 are off", "repetition_penalty"
        )
    return completion


def _check_supported(body: dict[str, Any]) -> None:
    wrong = [
        name
        for name in _UNSUPPORTED
        if (value := body.get(name)) is not None and value != _NEUTRAL.get(name, type(value)())
    ]
    if wrong:
        message = f"{wrong[0]} is not supported here and would change the answer: leave it out"
        raise ApiError(400, message, wrong[0])


def _as_api_error(error: ValidationError) -> ApiError:
    """The first thing that pydantic found, with the field that it is about."""
    found = error.errors(include_url=False)[0]
    path = [p for p in found["loc"] if p != "[key]"]  # it says that a dictionary's key is wrong
    field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)[1:]
    reason = f"{short(found['input'])}: {found['msg'].removeprefix('Value error, ')}"
    text = f"{field} is {'missing' if found['type'] == 'missing' else reason}"
    return ApiError(400, text, field)
