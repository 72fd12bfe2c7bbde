"""The processes of a data-parallel run over MLX's ring on this machine, and what they print."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Joins, runs its first argument, and ends as the command line does.
CHILD = """
import json, os, signal, sys, time
import mlx.core as mx
from kmerge_mlx.errors import KMergeError
from kmerge_mlx.train import ranks as ranks_module
from kmerge_mlx.train.ranks import connect

def say(value):
    print(json.dumps(value), flush=True)

try:
    {before}
    ranks = connect()
    rank = ranks.rank
    exec(sys.argv[1])
except KMergeError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(1)
"""


def start(
    commands: Sequence[Sequence[object]], folder: Path, **more: str
) -> list[subprocess.Popen]:
    """Starts one process a rank, each with its own command."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    file = folder / f"hosts{time.monotonic_ns()}.json"
    file.write_text(json.dumps(hosts))
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | more
    return [
        subprocess.Popen(
            [*map(str, command)],
            env=environment
            | ({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)} if len(commands) > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def start_ranks(size: int, body: str, folder: Path, before: str = "pass") -> list[subprocess.Popen]:
    """Starts ranks that run Python code with ``ranks`` and ``rank``; ``before`` they join."""
    code = CHILD.replace("{before}", before)
    return start([[sys.executable, "-c", code, body]] * size, folder)


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, without the lines that MLX's ring writes."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        (process.returncode, out, re.sub(r"(?m)^\[ring\].*\n?", "", err))
        for process, (out, err) in zip(processes, texts, strict=True)
    ]
