"""The processes of a data-parallel run over MLX's ring on this machine, and what they say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIMIT = 30.0

# Joins, does what the first argument says, and ends as the command line does.
CHILD = """
import json, os, signal, sys, time
import mlx.core as mx
from kmerge_mlx.errors import DataError, KMergeError
from kmerge_mlx.train import ranks as ranks_module, watch
from kmerge_mlx.train.ranks import connect

def wait_for_the_end():
    print("ready", flush=True)
    sys.stdin.readline()

def say(value):
    print(json.dumps(value), flush=True)

def run(body):
    with connect(lambda line: print("last resort:", line, file=sys.stderr, flush=True)) as ranks:
        exec(body, globals() | {"ranks": ranks, "rank": ranks.rank})

try:
    run(sys.argv[1])
except KMergeError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(1)
"""

# Real times would make the tests long.
SHORT = "watch.SILENCE_SECONDS, watch.BEAT_SECONDS, watch.GRACE_SECONDS = 3.0, 0.2, 1.0\n"


class Run:
    """Processes of one run, their output, and how they ended.

    Args:
        size: How many ranks.
        body: What each does with ``ranks`` and ``rank``.
        folder: For the host file.
        before: Runs before the ranks join.
    """

    def __init__(self, size: int, body: str, folder: Path, before: str = ""):
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
        hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
        for s in sockets:
            s.close()
        file = folder / f"hosts{time.monotonic_ns()}.json"
        file.write_text(json.dumps(hosts))
        code = CHILD.replace("def run(body)", before + "\ndef run(body)")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, body],
                env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def wait_until_ready(self) -> None:
        for process in self.processes:
            while process.stdout.readline() not in ("ready\n", ""):
                pass

    def end(self, but: int | None = None) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, outputs and errors, without what MLX itself says."""
        left = [process for rank, process in enumerate(self.processes) if rank != but]
        try:
            with ThreadPoolExecutor(len(left)) as pool:
                texts = list(pool.map(lambda p: p.communicate(timeout=LIMIT), left))
        finally:
            for process in self.processes:
                process.kill()
                process.communicate()
        said = ("[ring]", "Socket ")  # by MLX's ring
        errors = [
            "".join(line for line in err.splitlines(keepends=True) if not line.startswith(said))
            for _, err in texts
        ]
        return [process.returncode for process in left], [out for out, _ in texts], errors
