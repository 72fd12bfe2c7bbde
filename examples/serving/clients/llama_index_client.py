"""LlamaIndex's ``OpenAILike``."""

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
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

OWN = {"model": MODEL, "api_base": URL, "api_key": KEY, "max_tokens": 4, "max_retries": 0}
OWN |= {"context_window": 4096}
chat = OpenAILike(**OWN, is_chat_model=True, is_function_calling_model=True)
strict = OpenAILike(
    **OWN | {"max_tokens": 60}, is_chat_model=True, should_use_structured_outputs=True
)
complete = OpenAILike(**OWN, is_chat_model=False)


def look(at: int) -> str:
    """Looks at a place."""
    return str(at)


def asked(text, **more):
    return chat.chat([ChatMessage(role="user", content=text)], **more)


def streamed():
    return "".join(
        p.delta or "" for p in chat.stream_chat([ChatMessage(role="user", content=TREE)])
    )


def predicted():
    return strict.structured_predict(Verdict, PromptTemplate("{tree}"), tree=TREE)


def predicted_in_a_stream():
    *_, last = strict.stream_structured_predict(Verdict, PromptTemplate("{tree}"), tree=TREE)
    return last


def calls():
    tools = [FunctionTool.from_defaults(look)]
    answer = chat.chat_with_tools(tools, user_msg=TREE)
    return chat.get_tool_calls_from_response(answer, error_on_no_tool_call=False)


check("completion", lambda: complete.complete(TREE).text, "true")
check("completion, streamed", lambda: [*complete.stream_complete(TREE)][-1].text, "true")
check("chat", lambda: asked(TREE).message.content, "true")
check("chat, streamed", streamed, "true")
check("tags", lambda: asked(TAGGED).message.content, "true")
check("usage", lambda: asked(TAGGED).raw.usage.merged_tokens, lambda n: n > 0)
check("document and question", lambda: asked(TWO_PARTS).raw.usage.raw_tokens, lambda n: n > 0)
check("stop", lambda: asked(TREE, stop=["e"]).message.content, "tru")
check("too long", lambda: refused(lambda: asked(TOO_LONG)), overflows)
check("in a schema", predicted, is_verdict)
check("in a schema, streamed", predicted_in_a_stream, is_verdict)
check("tools", calls, [])
