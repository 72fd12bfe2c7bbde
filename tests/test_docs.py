"""The README and the docs: every fenced command is run as it stands, or says why it is not."""

from __future__ import annotations

import json
import re
import runpy

import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from tests.cli_runner import CHATML, copy_base
from tests.doc_blocks import BASE_REPO, PAGES, ROOT, RUN, Sandbox, blocks, in_moments
from tests.hub_server import Repo, running_hub, settings, using

TEXT = "The bridge was closed in May. It will be open again in June, says the council.\n"
PAGES_WITHOUT_AN_ADAPTER = ("README.md",)
"""Their own commands make it."""


@pytest.fixture
def sandbox(tmp_path, base_path, checkpoint_path, request):
    folder = tmp_path / "work"
    folder.mkdir()
    home = tmp_path / "home"
    with running_hub() as hub, using(hub, home):
        base = copy_base(base_path, tmp_path / "base", CHATML)
        hub.repos[BASE_REPO] = Repo.of(base)
        sandbox = Sandbox(folder, in_moments, **settings(hub, home))
        for name in ("examples", "benchmarks"):
            sandbox.copy(ROOT / name, name)
        sandbox.copy(checkpoint_path, "checkpoint")
        sandbox.write("docs/images/.keep", "")
        for name in ("prompt.txt", "report.txt"):
            sandbox.write(name, TEXT * 3)
        row = json.dumps({"prompt": TEXT, "completion": "June"}) + "\n"
        for split in ("train", "valid", "test"):
            sandbox.write(f"data/{split}.jsonl", row * 8)
        if request.param.name not in PAGES_WITHOUT_AN_ADAPTER:
            for name in ("adapter", "adapters/k4"):
                convert_checkpoint(str(checkpoint_path), folder / name, model=str(base))
        yield sandbox


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sandbox", "page"), [(p, p) for p in PAGES], ids=lambda p: p.name, indirect=["sandbox"]
)
def test_every_command_on_a_page_runs_as_it_stands(sandbox, page):
    for block in blocks(page):
        if block.language in RUN and block.excuse is None:
            done = sandbox.run(*RUN[block.language], block.text)
            assert done.returncode == 0, f"{block.place}\n{block.text}\n{done.stdout}{done.stderr}"


def test_no_command_hides_in_a_block_that_is_not_run():
    hidden = [
        block.place
        for page in PAGES
        for block in blocks(page)
        if block.language not in RUN
        and re.search(r"^(kmerge-mlx|python|pip|mlx)[ _.]", block.text, re.MULTILINE)
        and not (block.language == "text" and re.search(r"\[|\.\.\.|Usage: ", block.text))
    ]
    assert hidden == []


def test_every_excuse_is_a_reason():
    excuses = [b.excuse for page in PAGES for b in blocks(page) if b.excuse is not None]
    reason = re.compile(r"(needs|takes|a fragment|installs)\b")
    assert [excuse for excuse in excuses if not reason.match(excuse)] == []


def test_the_reference_and_the_map_say_what_the_code_does():
    reference = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    assert reference["main"](check=True) == 0
