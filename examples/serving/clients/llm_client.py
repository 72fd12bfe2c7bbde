"""Simon Willison's ``llm``: a model of ``extra-openai-models.yaml``, asked on the command line."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import DOCUMENT, MODEL, QUESTION, TAGGED, TOO_LONG, TREE, URL, check, overflows, refused

own = f"model_name: {MODEL}\n  api_base: {URL}\n  supports_tools: true"
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
check("tools", lambda: llm(TREE, "--functions", LOOK), bool)
