"""One ``generate`` reads the adapter's config once, parses the tags once, encodes the text once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from kmerge_mlx.cli import inputs
from kmerge_mlx.prompts import lay_out, tags
from tests.cli_runner import CHATML, copy_base, run

CONTEXT, QUESTION = "One <merge>two three</merge> four.", "Which of <raw>them</raw>?"


@pytest.fixture
def counted(monkeypatch):
    """How often each file was opened, and each text parsed or encoded."""
    found = Counter()

    def count(owner, name, what, place):
        inner = getattr(owner, name)

        def counting(*args, **options):
            found[f"{what} {args[place]}"] += 1
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    count(Path, "open", "opened", 0)
    for module in (tags, lay_out, inputs):
        count(module, "parse", "parsed", 0)
    for name in ("__call__", "encode"):
        count(PreTrainedTokenizerBase, name, "encoded", 1)
    return found


@pytest.mark.parametrize("template", [False, True])
def test_everything_is_read_once(counted, base_path, adapter_path, tmp_path, template):
    base = copy_base(base_path, tmp_path / "base", CHATML)
    (tmp_path / "context.txt").write_text(CONTEXT)
    args = ("--model", base, "--adapter-path", adapter_path, "--k", 4, "-m", 2)
    args += ("--apply-chat-template",) * template
    counted.clear()
    done = run("generate", *args, tmp_path / "context.txt", "-p", QUESTION)
    assert done.code == 0, done.err
    configs = (adapter_path / name for name in ("merge_config.json", "adapter_config.json"))
    for name in (*configs, tmp_path / "context.txt"):
        assert counted[f"opened {name}"] == 1
    assert counted[f"parsed {CONTEXT}"] == counted[f"parsed {QUESTION}"] == 1
    assert [n for key, n in counted.items() if key.startswith("encoded ") and "two" in key] == [1]
