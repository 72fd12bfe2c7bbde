"""LangChain's ``langchain-openai``."""

from checks import (
    KEY,
    MODEL,
    TAGGED,
    TOO_LONG,
    TREE,
    TWO_PARTS,
    URL,
    Verdict,
    check,
    is_verdict,
    overflows,
    refused,
)
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

OWN = {"model": MODEL, "base_url": URL, "api_key": KEY, "max_tokens": 4, "max_retries": 0}
longer = ChatOpenAI(**OWN | {"max_tokens": 60})
chat, complete = ChatOpenAI(**OWN), OpenAI(**OWN)


@tool
def look(at: int) -> str:
    """Looks at a place."""
    return str(at)


def usage(prompt):
    return chat.invoke(prompt).response_metadata["token_usage"]


def streamed_usage():
    own = ChatOpenAI(**OWN, stream_usage=True)
    return [p.usage_metadata for p in own.stream(TREE) if p.usage_metadata][-1]["input_tokens"]


CALLED = [
    HumanMessage(TREE),
    AIMessage("", tool_calls=[{"id": "1", "name": "look", "args": {"at": 1}}]),
    ToolMessage("found", tool_call_id="1"),
]

check("completion", lambda: complete.invoke(TREE), "true")
check("completion, streamed", lambda: "".join(complete.stream(TREE)), "true")
check("chat", lambda: chat.invoke(TREE).content, "true")
check("chat, streamed", lambda: "".join(p.content for p in chat.stream(TREE)), "true")
check("tags", lambda: chat.invoke(TAGGED).content, "true")
check("usage", lambda: usage(TAGGED)["merged_tokens"], lambda n: n > 0)
check("usage of a stream", streamed_usage, lambda n: n > 30)
check("document and question", lambda: usage(TWO_PARTS)["raw_tokens"], lambda n: n > 0)
check("stop", lambda: chat.bind(stop=["e"]).invoke(TREE).content, "tru")
check("batch", lambda: [m.content for m in chat.batch([TREE] * 3)], ["true"] * 3)
check("too long", lambda: refused(lambda: chat.invoke(TOO_LONG)), overflows)
check("in a schema", lambda: longer.with_structured_output(Verdict).invoke(TREE), is_verdict)
check("tools", lambda: chat.bind_tools([look]).invoke(TREE).tool_calls, [])
check("result of a tool", lambda: chat.invoke(CALLED), lambda answer: answer.id is not None)
