"""The fenced blocks of the README and the docs, and a place to run them and the examples in.

In the sandbox ``kmerge-mlx`` asks this process to run the command, which has loaded everything, and
what would take hours, or wait for somebody, ends in moments. All else is run as it stands.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path

from tests.cli_runner import PLAIN_USER, Result, command, environment, run

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
    """A fenced block: where it is, what it holds, and why it is not run, if it is not."""

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


SHORTER = {
    "train": {"--iters": 2, "--val-batches": 1, "--batch-size": 1, "--num-trees": 8},
    "data": {"--num-trees": 60},
    "bench": {"--num-trials": 1, "--generation-tokens": 2},
    "evaluate": {"--limit": 4, "--num-trees": 2, "--num-needles": 1},
}
OF_TASK = {"--num-trees": "textualized-tree", "--num-needles": "recall"}
"""Options that no other task has; ``--limit`` belongs to all but these two."""
SHARE_OF_ITERS = 50
"""How much less a page's own ``--iters`` become: still more where a run goes on."""
SAID = b"What changed in May?\n/stats\nq\n"


def as_it_stands(environment: Mapping[str, str], *line: str) -> Result:
    """Runs a command line."""
    return run(*line)


def in_moments(environment: Mapping[str, str], name: str, *given: str) -> Result:
    """Runs a command line of the docs with less to do; a server in a process of its own."""
    line = [name, *given]
    if name == "serve":
        return _served(environment, line)
    if "--iters" in line:
        at = line.index("--iters") + 1
        line[at] = str(int(line[at]) // SHARE_OF_ITERS)
    for flag, value in SHORTER.get(name, {}).items():
        own = set(OF_TASK.values()) & set(line)
        fits = OF_TASK[flag] in own if flag in OF_TASK else not (flag == "--limit" and own)
        kept = flag == "--iters" and flag in line
        line += [flag, str(value)] if fits and not kept else []  # the last one counts
    return run(*line, stdin=SAID if name == "chat" else b"")


def _served(environment: Mapping[str, str], line: list[str]) -> Result:
    """Starts a server, and ends it when it is there."""
    line = command(*line, *(() if "--port" in line else ("--port", "0")))
    server = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    said = []
    for text in server.stderr:
        said.append(text)
        if re.search(r" at http://\S+/v1", text):
            server.send_signal(signal.SIGTERM)
    return Result(server.wait(), "", "".join(said))


ASK = f"""\
#!{sys.executable} -IS
import os, sys
from multiprocessing.connection import Client

with Client(("127.0.0.1", int(os.environ["SANDBOX_PORT"]))) as connection:
    connection.send((os.getcwd(), sys.argv[1:]))
    code, out, err = connection.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class Sandbox:
    """A folder in which blocks or scripts are run, one after the other.

    Args:
        folder: An empty folder.
        act: What runs a line of ``kmerge-mlx``.
        settings: Further environment.
    """

    def __init__(self, folder: Path, act: Callable[..., Result] = as_it_stands, **settings: str):
        self.folder, self._act = folder, act
        tools = folder.with_name(f"{folder.name}-tools")
        tools.mkdir()
        (tools / "kmerge-mlx").write_text(ASK)
        for name in ("python", "python3"):
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for script in tools.iterdir():
            script.chmod(0o755)
        path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
        python_path = f"{ROOT}{os.pathsep}{PLAIN_USER}"
        self._environment = environment(**settings, PATH=path, PYTHONPATH=python_path)

    def copy(self, source: Path, name: str) -> None:
        """Puts a folder or a file there."""
        (shutil.copytree if source.is_dir() else shutil.copy)(source, self.folder / name)

    def write(self, name: str, text: str) -> None:
        """Writes a file there."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def run(self, *line: object) -> subprocess.CompletedProcess[str]:
        """Runs a command line."""
        with Listener(("127.0.0.1", 0), backlog=8) as asked, ThreadPoolExecutor(1) as thread:
            port = asked.address[1]

            def end(_: Future) -> None:
                with Client(asked.address) as connection:
                    connection.send(None)

            done = thread.submit(
                subprocess.run,
                [*map(str, line)],
                cwd=self.folder,
                env=self._environment | {"SANDBOX_PORT": str(port)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                timeout=300,
            )
            done.add_done_callback(end)
            while True:
                with asked.accept() as connection:
                    if (wanted := connection.recv()) is None:
                        return done.result()
                    with chdir(wanted[0]):
                        result = self._act(self._environment, *wanted[1])
                    connection.send((result.code, result.out, result.err))
