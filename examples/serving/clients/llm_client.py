"""Simon Willison's ``llm``: a model of ``extra-openai-models.yaml``, asked on the command line."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import (
    DOCUMENT,
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

own = f"model_name: {MODEL}\n  api_base: {URL}\n  supports_tools: true\n  supports_schema: true"
home = tempfile.TemporaryDirectory()
(Path(home.name) / "extra-openai-models.yaml").write_text(
    f"- model_id: merging\n  {own}\n- model_id: completing\n  {own}\n  completions: true\n"
)


def llm(*arguments, stdin=None, model="merging"):
    line = [sys.executable, "-m", "llm", "prompt", "-m", model, "-o", "max_tokens", "4", *arguments]
    settings = os.environ | {"LLM_USER_PATH": home.name, "OPENAI_API_KEY": "none"}
    done = subprocess.run(line, env=settings, input=stdin or "", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.removesuffix("\n") + (done.stderr if "--usage" in arguments else "")


def parsed(*arguments):
    schema = json.dumps(Verdict.model_json_schema())
    return Verdict.model_validate_json(
        llm(TREE, "--schema", schema, "-o", "max_tokens", "60", *arguments)
    )


LOOK = 'def look(at: int) -> str:\n    "Looks."\n    return str(at)'

check("completion", lambda: llm(TREE, "--no-stream", model="completing"), "true")
check("completion, streamed", lambda: llm(TREE, model="completing"), "true")
check("chat", lambda: llm(TREE, "--no-stream"), "true")
check("chat, streamed", lambda: llm(TREE), "true")
check("tags", lambda: llm(TAGGED), "true")
check("usage", lambda: llm(TREE, "--usage", "--no-stream"), lambda text: "36 input" in text)
check("cat file | llm", lambda: llm(f", Task:{QUESTION}", stdin=DOCUMENT), bool)
check("stop", lambda: llm(TREE, "-o", "stop", "e"), "tru")
check("too long", lambda: refused(lambda: llm(stdin=TOO_LONG)), overflows)
check("in a schema", lambda: parsed("--no-stream"), is_verdict)
check("in a schema, streamed", parsed, is_verdict)
check("tools", lambda: llm(TREE, "--functions", LOOK), bool)
