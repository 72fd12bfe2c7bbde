"""The fenced blocks of the README and the docs, and a place to run them in.

Owns: which pages there are, what excuses a block from being run, and the sandbox: a folder with the
files that the docs speak of, a hub on the loopback that has the base they name, and a
``kmerge-mlx`` that trains for moments only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cli_runner import PLAIN_USER, environment
from tests.hub_runs import settings
from tests.hub_server import Hub

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kmerge_mlx/bundled/README.md"),
        *ROOT.glob("docs/*.md"),
    ]
)
RUN = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
BASE_REPO = "Qwen/Qwen2.5-0.5B"

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_EXCUSE = re.compile(r"<!-- not run: (.+?) -->\n+ *\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: The page it is on.
        line: Where.
        language: What the fence says it is.
        text: What it holds.
        excuse: Why it is not run, or None.
    """

    page: Path
    line: int
    language: str
    text: str
    excuse: str | None

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        excuse = _EXCUSE.search(before)
        lines = [line.removeprefix(fence[1]) for line in fence[3].splitlines()]
        line = before.count("\n") + 1
        found.append(Block(page, line, fence[2], "\n".join(lines), excuse and excuse[1]))
    return found


class Sandbox:
    """A folder in which a page's blocks are run, one after the other.

    Args:
        folder: An empty folder.
        hub: A hub that has the base.
        home: The hub client's cache.
    """

    def __init__(self, folder: Path, hub: Hub, home: Path):
        self.folder = folder
        tools = folder.with_name(f"{folder.name}-tools")
        tools.mkdir()
        for name, module in (("kmerge-mlx", "tests.doc_command"), ("python", "")):
            line = f"-m {module}" if module else ""
            script = tools / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {line} "$@"\n')
            script.chmod(0o755)
        path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = environment(
            **settings(hub, home),
            PATH=path,
            PYTHONPATH=f"{ROOT}{os.pathsep}{PLAIN_USER}",
        )

    def copy(self, source: Path, name: str) -> None:
        """Puts a folder or a file there."""
        (shutil.copytree if source.is_dir() else shutil.copy)(source, self.folder / name)

    def write(self, name: str, text: str) -> None:
        """Writes a file there."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def run(self, block: Block) -> subprocess.CompletedProcess[str]:
        """Runs a block as it stands."""
        return subprocess.run(
            [*RUN[block.language], block.text],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
        )
