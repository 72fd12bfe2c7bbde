"""Downloads and uploads that are killed: nothing torn is ever seen, and the next run ends well.

The killed process downloads or uploads by this project's own functions, at random moments after its
first request; the oracle is the content of the repo on the server.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.adapters.schema import BaseModelConfig
from tests.cli_runner import environment, run
from tests.hub_runs import settings, using
from tests.hub_server import Hub, running_hub
from tests.saved_adapters import make

DOWNLOAD = """
import sys
from kmerge_mlx.errors import KMergeError
from kmerge_mlx.hub.fetch import fetch
try:
    print(fetch("user/k4", ["*.json", "*.safetensors"], KMergeError))
except KMergeError as error:
    sys.exit(str(error))
"""
UPLOAD = """
import sys
from kmerge_mlx.errors import UploadError
from kmerge_mlx.hub.fetch import parse
from kmerge_mlx.tools.upload import collect, send
planned = collect(sys.argv[1], parse("me/one", UploadError))
print("ready", flush=True)
sys.stdin.readline()
send(planned, "by a process that may be killed", private=False)
"""
pytestmark = pytest.mark.slow
SPAN = 1.2  # seconds that a download or an upload takes from its first request, about


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter whose base is the bundled one by name, some 100 kB large."""
    made = make(4)
    merge = replace(made.merge, base=BaseModelConfig("bundled"))
    path = tmp_path / "adapter"
    save_adapter(replace(made, merge=merge), path)
    return path


@pytest.fixture
def hub(adapter):
    with running_hub(k4=adapter) as hub:
        # Bytes enough for a kill to fall in the middle of a file.
        files = hub.repos["user/k4"].files()
        files |= {f"{i}.safetensors": random.Random(i).randbytes(1 << 17) for i in range(3)}
        hub.pause = SPAN / 10
        hub.tokens["hf_write"] = "write"
        yield hub


def start(code: str, hub: Hub, home: Path, *args: object, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment(**settings(hub, home), HF_TOKEN="hf_write", **more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_after_the_first_request(process: subprocess.Popen, hub: Hub, seconds: float) -> bool:
    """Kills a process; says whether it was still at work."""
    end = time.monotonic() + 60
    while not hub.requests and time.monotonic() < end:
        time.sleep(0.005)
    assert hub.requests
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    return False


def assert_whole(home: Path, files: dict[str, bytes]) -> None:
    """Every file that can be seen in the cache's snapshots is the repo's."""
    for path in (home / "hub").glob("models--*/snapshots/*/**/*"):
        if path.is_file():
            assert path.read_bytes() == files[path.name], path


def test_kills_in_a_download_leave_nothing_torn(hub, tmp_path):
    files, rng, killed = hub.repos["user/k4"].files(), random.Random(6), 0
    for i in range(10):
        home = tmp_path / f"home{i % 3}"  # some go on with what others left
        hub.requests.clear()
        process = start(DOWNLOAD, hub, home)
        killed += kill_after_the_first_request(process, hub, rng.uniform(0, SPAN / 2))
        assert_whole(home, files)
        with using(hub, home, HF_HUB_OFFLINE=True):
            found = run("info", "user/k4")
        # Without the network it is whole, or it is refused.
        assert found.code == 0 or "not in the cache, or not all of it" in found.err
    assert killed
    for i in range(3):
        done = start(DOWNLOAD, hub, tmp_path / f"home{i}")
        out, err = done.communicate(timeout=60)
        assert done.returncode == 0, err
        folder = Path(out.strip())
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_kills_in_an_upload_leave_the_repo_as_it_was_or_whole(hub, tmp_path, adapter):
    rng, before = random.Random(7), {".gitattributes"}
    for _ in range(4):
        hub.requests.clear()
        process = start(UPLOAD, hub, tmp_path / "home", adapter)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        process.stdin.write("\n")
        process.stdin.flush()
        kill_after_the_first_request(process, hub, rng.uniform(0, 0.3))
        for repo in [repo for name, repo in hub.repos.items() if name == "me/one"]:
            assert set(repo.files()) in (before, before | {p.name for p in adapter.iterdir()})
    hub.pause = 0.0
    with using(hub, tmp_path / "home", token="hf_write"):
        assert run("upload", adapter, "me/one", "--license", "mit").code == 0
    theirs = hub.repos["me/one"].files()
    same = [name for name in theirs if name.endswith(".safetensors")]
    assert len(same) == 2
    assert all(theirs[name] == (adapter / name).read_bytes() for name in same)
