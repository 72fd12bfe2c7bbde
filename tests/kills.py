"""Runs that kill themselves at their n-th step on the disk: neither clock nor load decides where.

One process imports everything and forks for each run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# Reads lines [COMMAND, SOURCES, DESTINATION, STEP]: does it in a fork that kills itself at that
# step around the destination (0: never), and says how it ended and how many steps it took.
FORKING = """
import json, os, signal, sys
from pathlib import Path
from kmerge_mlx.cli import main
from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.convert.export import export_adapter
from kmerge_mlx.convert.window import convert_window
from kmerge_mlx.source import Source
from kmerge_mlx.tools.fuse import fuse
from kmerge_mlx.tools.quantize import quantize
from kmerge_mlx.train import dataset, loop

dataset.HELD_OUT_TREES = 20

def train(*arguments):
    sys.argv = ["kmerge-mlx", "train", *arguments[:-1], "--adapter-path", arguments[-1]]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise

WRITERS = {
    "convert": lambda source, to: convert_checkpoint(source, to, force=True),
    "window": lambda source, to: convert_window(Path(source), "it", to, force=True),
    "export": lambda source, to: export_adapter(source, to, force=True),
    "fuse": lambda *named: fuse(Source.find(*named[:2]), named[2], text="One", force=True),
    "quantize": lambda *named: quantize(Source.find(*named[:2]), named[2], text="One", force=True),
    "train": train,
}
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
around, at, taken = "", 0, 0

def count(event, arguments):
    global taken
    if around and event in STEPS and around in str(arguments[0]):
        taken += 1
        if taken == at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
for line in sys.stdin:
    command, sources, destination, step = json.loads(line)
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        around, at = os.path.dirname(destination), step
        try:
            WRITERS[command](*sources, destination)
            os.write(theirs, str(taken).encode())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
    os.close(theirs)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), os.read(ours, 20).decode() or 0, flush=True)
    os.close(ours)
"""


class Writer:
    """Writes in forks of one process, which ends with the ``with`` block."""

    def __enter__(self) -> Writer:
        # Bit for bit takes one thread: sums in another order are other sums.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-c", FORKING]
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)
        return self

    def __exit__(self, *raised: object) -> None:
        with self._process:
            self._process.stdin.close()

    def __call__(
        self, command: str, sources: list[str], path: Path, step: int = 0
    ) -> tuple[int, int]:
        """Gives the exit code of a run, and the steps that it took."""
        self._process.stdin.write(json.dumps([command, sources, str(path), step]) + "\n")
        self._process.stdin.flush()
        code, taken = self._process.stdout.readline().split()
        return int(code), int(taken)
