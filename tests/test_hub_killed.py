"""Downloads that are killed: nothing torn is ever seen, and the next one ends well.

The killed process downloads by this project's own function, and dies at random moments after its
first request; the oracle is the content of the repo on the server.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli_runner import environment, run
from tests.hub_runs import settings, using
from tests.hub_server import Hub, running_hub
from tests.saved_adapters import saved

DOWNLOAD = """
from kmerge_mlx.errors import KMergeError
from kmerge_mlx.hub import fetch
print(fetch("user/k4", ["*.json", "*.safetensors"], KMergeError))
"""
SPAN = 1.2  # seconds that a download takes from its first request, about


def start(hub: Hub, home: Path) -> subprocess.Popen:
    hub.requests.clear()
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD],
        env=environment(**settings(hub, home)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_kills_in_a_download_leave_nothing_torn(tmp_path):
    with running_hub(k4=saved(tmp_path / "adapter")) as hub:
        # Bytes enough for a kill to fall in the middle of a file.
        files = hub.repos["user/k4"].files()
        files |= {f"{i}.safetensors": random.Random(i).randbytes(1 << 17) for i in range(3)}
        hub.repos["user/k4"].commit(files)
        hub.pause = SPAN / 10
        files, rng, homes = hub.repos["user/k4"].files(), random.Random(6), []
        for i in range(10):
            homes.append(tmp_path / f"home{i % 3}")  # some go on with what others left
            process, end = start(hub, homes[-1]), time.monotonic() + 60
            while not hub.requests and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, SPAN / 2))
            process.kill()
            process.communicate()
            for path in (homes[-1] / "hub").glob("models--*/snapshots/*/**/*"):
                assert not path.is_file() or path.read_bytes() == files[path.name]
            with using(hub, homes[-1], HF_HUB_OFFLINE=True):
                found = run("info", "user/k4")
            # Without the network it is whole, or it is refused.
            assert found.code == 0 or "not in the cache, or not all of it" in found.err
        for home in homes[:3]:
            out, err = start(hub, home).communicate(timeout=60)
            folder = Path(out.strip())
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == files, err
