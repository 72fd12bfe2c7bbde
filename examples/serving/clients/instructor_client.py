"""``instructor``, over the ``openai`` package."""

import instructor
from checks import KEY, MODEL, TREE, URL, Verdict, check, is_verdict
from openai import OpenAI

plain = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
OWN = {"model": MODEL, "messages": [{"role": "user", "content": TREE}], "max_tokens": 60}


def asked(mode):
    client = instructor.from_openai(plain, mode=mode)
    return client.chat.completions.create(response_model=Verdict, max_retries=0, **OWN)


def streamed():
    client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
    *_, last = client.chat.completions.create_partial(response_model=Verdict, **OWN)
    return last.right


check("in a schema", lambda: asked(instructor.Mode.JSON_SCHEMA), is_verdict)
check("in a schema, streamed", streamed, lambda right: right in ("true", "false"))
