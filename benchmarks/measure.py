"""What the benchmarks share: a process's memory, and servers in processes of their own."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen


def resident(pid: int | None = None) -> int:
    """The resident set of a process, or of this one, in bytes."""
    command = ["ps", "-o", "rss=", "-p", str(pid or os.getpid())]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024


def peak() -> int:
    """This process's highest resident set, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's, before exec
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def start_server(line: list[str], log: Any = None) -> tuple[subprocess.Popen, str]:
    """A server, ``python -m`` with a line of arguments, once it is healthy; and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    line = [sys.executable, "-m", *line, "--port", str(port), "--log-level", "ERROR"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(line, stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        try:
            if urlopen(f"{url}/health", timeout=5).status == 200:
                return server, f"{url}/v1"
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{' '.join(line[2:4])} did not start: its log says why")


def stop_server(server: subprocess.Popen) -> int:
    """Ends a server as an operator would; its exit code."""
    server.send_signal(signal.SIGTERM)
    try:
        return server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()
