"""``kmerge-mlx`` as the docs' commands are run by a test: what would take hours, or wait for
somebody, ends in moments. Everything else is run as it stands.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys

from tests.cli_runner import command

SHORTER = {
    "train": {"--iters": 2, "--val-batches": 1, "--batch-size": 1, "--num-trees": 8},
    "data": {"--num-trees": 60},
    "evaluate": {"--limit": 4, "--num-trees": 2, "--num-needles": 1},
}
OF_TASK = {"--num-trees": "textualized-tree", "--num-needles": "recall"}
"""Options that no other task has; ``--limit`` belongs to all but these two."""
SHARE_OF_ITERS = 50
"""How much less a page's own ``--iters`` become: still more where a run goes on."""
SAID = "What changed in May?\n/stats\nq\n"


def main() -> int:
    """Runs a command line; returns its exit code."""
    name, given = sys.argv[1], sys.argv[1:]
    if name == "serve":
        return _serve(given)
    if "--iters" in given:
        at = given.index("--iters") + 1
        given[at] = str(int(given[at]) // SHARE_OF_ITERS)
    for flag, value in SHORTER.get(name, {}).items():
        given += [flag, str(value)] if _fits(flag, given) else []
    if name == "chat":
        return subprocess.run(command(*given), input=SAID, text=True).returncode
    return subprocess.run(command(*given)).returncode


def _fits(flag: str, given: list[str]) -> bool:
    """Whether an option can be added to a command line."""
    own = set(OF_TASK.values()) & set(given)
    if flag in OF_TASK:
        return OF_TASK[flag] in own and flag not in given
    return flag not in given and not (flag == "--limit" and own)


def _serve(given: list[str]) -> int:
    """Starts a server, and ends it when it is there."""
    line = command(*given, "--port", "0") if "--port" not in given else command(*given)
    server = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    said = ""
    for said in server.stderr:
        print(said, end="", file=sys.stderr)
        if re.search(r" at http://\S+/v1", said):
            server.send_signal(signal.SIGTERM)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
