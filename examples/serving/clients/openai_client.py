"""The ``openai`` package."""

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
from openai import OpenAI

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}


def chat(content, **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, **more)


def complete(prompt, **more):
    return client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, **more)


def parsed():
    messages = [{"role": "user", "content": TREE}]
    own = {"messages": messages, "response_format": Verdict, "max_tokens": 60}
    return client.chat.completions.parse(model=MODEL, **own).choices[0].message.parsed


def streamed(stream):
    pieces = [piece.choices[0] for piece in stream if piece.choices]
    return "".join(p.text if hasattr(p, "text") else p.delta.content or "" for p in pieces)


def counts(answer):
    usage = answer.usage
    return usage.prompt_tokens, usage.merged_tokens, usage.raw_tokens, usage.compressed_tokens


PARTS = [
    {"type": "text", "text": DOCUMENT, "merge": True},
    {"type": "text", "text": f", Task:{QUESTION}", "merge": False},
]
CALLED = [
    {"role": "user", "content": TREE},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "found"},
]

check("models", lambda: [m.id for m in client.models.list()], [MODEL])
check("completion", lambda: complete(TREE).choices[0].text, "true")
check("completion, streamed", lambda: streamed(complete(TREE, stream=True)), "true")
check("chat", lambda: chat(TREE).choices[0].message.content, "true")
check("chat, streamed", lambda: streamed(chat(TREE, stream=True)), "true")
check("tags", lambda: chat(TAGGED).choices[0].message.content, "true")
check("usage", lambda: counts(chat(TAGGED)), lambda n: n[0] == n[1] + n[2] > 3 * n[3])
check("document and question", lambda: counts(chat(PARTS)), lambda n: n[1] > 0 < n[2])
check("stop", lambda: chat(TREE, stop=["e"]).choices[0].message.content, "tru")
check("too long", lambda: refused(lambda: chat(TOO_LONG)), overflows)
check("in a schema", parsed, is_verdict)
check(
    "any object, streamed",
    lambda: streamed(chat(TREE, stream=True, response_format={"type": "json_object"})),
    lambda text: text.startswith("{"),
)
check("tools", lambda: chat(TREE, tools=[TOOL]).choices[0].message.tool_calls, None)
check(
    "result of a tool",
    lambda: client.chat.completions.create(model=MODEL, messages=CALLED, max_tokens=4),
    lambda answer: answer.choices[0].finish_reason in ("stop", "length"),
)
