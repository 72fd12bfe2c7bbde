"""litellm, whose name for any OpenAI-compatible server is ``openai/MODEL``."""

import os

from checks import (
    DOCUMENT,
    KEY,
    MODEL,
    QUESTION,
    TAGGED,
    TOO_LONG,
    TREE,
    URL,
    Verdict,
    check,
    is_verdict,
    overflows,
    refused,
)

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it asks GitHub for prices otherwise
import litellm

litellm.suppress_debug_info = True
OWN = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

PARTS = [
    {"type": "text", "text": DOCUMENT, "merge": True},
    {"type": "text", "text": f", Task:{QUESTION}", "merge": False},
]


def chat(content, **more):
    own = OWN | {"messages": [{"role": "user", "content": content}]}
    return litellm.completion(**own | more)


def complete(prompt, **more):
    own = OWN | {"model": f"text-completion-openai/{MODEL}"}
    return litellm.text_completion(prompt=prompt, **own, **more)


def streamed(pieces):
    return "".join(piece.choices[0].delta.content or "" for piece in pieces)


def in_a_schema(**more):
    return chat(TREE, response_format=Verdict, **more)


def parsed(text):
    return Verdict.model_validate_json(text)


def usage_of_stream():
    options = {"include_usage": True}
    *_, last = chat(TAGGED, stream=True, stream_options=options)
    return last.usage.prompt_tokens, last.usage.completion_tokens


check(
    "models", lambda: litellm.get_valid_models(True, "openai", api_key=KEY, api_base=URL), [MODEL]
)
check("completion", lambda: complete(TREE).choices[0].text, "true")
check("chat", lambda: chat(TREE).choices[0].message.content, "true")
check("chat, streamed", lambda: streamed(chat(TREE, stream=True)), "true")
check("tags", lambda: chat(TAGGED).choices[0].message.content, "true")
check("usage", lambda: chat(TAGGED).usage.merged_tokens, lambda n: n > 0)
check("usage of a stream", usage_of_stream, lambda n: n[0] > 30 and n[1] > 0)
check("document and question", lambda: chat(PARTS).usage.raw_tokens, lambda n: n > 0)
check("stop", lambda: chat(TREE, stop=["e"]).choices[0].message.content, "tru")
check("too long", lambda: refused(lambda: chat(TOO_LONG)), overflows)
check(
    "its exception",
    lambda: refused(lambda: chat(TOO_LONG)).split(":")[0],
    "ContextWindowExceededError",
)
check(
    "in a schema",
    lambda: parsed(in_a_schema(max_tokens=60).choices[0].message.content),
    is_verdict,
)
check(
    "in a schema, streamed",
    lambda: parsed(streamed(in_a_schema(max_tokens=60, stream=True))),
    is_verdict,
)
check("tools", lambda: chat(TREE, tools=[TOOL]).choices[0].message.tool_calls, None)
