"""pydantic-ai's ``OpenAIChatModel``."""

import asyncio

from checks import (
    KEY,
    MODEL,
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
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.messages import ModelRequest, ModelResponse, ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
agent = Agent(model, model_settings={"max_tokens": 4})
handy = Agent(model, model_settings={"max_tokens": 4})


strict = Agent(model, output_type=NativeOutput(Verdict), model_settings={"max_tokens": 60})


@handy.tool_plain
def look(at: int) -> str:
    """Looks at a place."""
    return str(at)


async def streamed():
    async with agent.run_stream(TREE) as answer:
        return "".join([piece async for piece in answer.stream_text(delta=True)])


CALLED = [
    ModelRequest.user_text_prompt("Look."),
    ModelResponse([ToolCallPart("look", {"at": 1}, "1")]),
    ModelRequest([ToolReturnPart("look", "1", "1")]),
]

check("chat", lambda: agent.run_sync(TREE).output, "true")
check("chat, streamed", lambda: asyncio.run(streamed()), "true")
check("tags", lambda: agent.run_sync(TAGGED).output, "true")
check("usage", lambda: agent.run_sync(TAGGED).usage.input_tokens, lambda n: n > 30)
check("instructions", lambda: Agent(model, instructions="<raw> </raw>").run_sync(TREE).output, bool)
check("stop", lambda: agent.run_sync(TREE, model_settings={"stop_sequences": ["e"]}).output, "tru")
check("too long", lambda: refused(lambda: agent.run_sync(TOO_LONG)), overflows)
check("in a schema", lambda: strict.run_sync(TREE).output, is_verdict)
check("tools", lambda: handy.run_sync(TREE).output, bool)
check("result of a tool", lambda: handy.run_sync(TREE, message_history=CALLED).output, bool)
