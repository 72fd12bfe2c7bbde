"""Checkpoints and bases by hub repo id, from a hub on the loopback that can fail on demand."""

from __future__ import annotations

import json

import pytest

from tests.cli_runner import run_process
from tests.hub_server import running_hub

# Nothing here may wait for the real hub: no proxies, no telemetry, no second transport.
QUIET = {
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "NO_PROXY": "*",
}


@pytest.fixture
def hub(checkpoint_path, base_path):
    with running_hub(ckpt=checkpoint_path, base=base_path) as hub:
        yield hub


@pytest.fixture
def from_hub(hub, tmp_path):
    """Runs a command against the hub, in ``work/`` and with a fresh cache."""
    work = tmp_path / "work"
    work.mkdir()

    def run(*args):
        home = str(tmp_path / "hf_home")
        return run_process(*args, cwd=work, HF_ENDPOINT=hub.url, HF_HOME=home, **QUIET)

    return run


def test_repo_ids_do_for_convert_and_generate(hub, from_hub, tmp_path):
    result = from_hub("convert", "user/ckpt", "adapter", "--model", "user/base")
    assert (result.code, result.out) == (0, ""), result.err
    assert result.err == "adapter: K = 4, D = 64, 50 tensors, 0.9 MB, base user/base\n"

    (tmp_path / "work" / "prompt.txt").write_text("Tree: JN\n+WO\n++UP\n++JG\n")
    args = ("--model", "user/base", "--adapter-path", "adapter", "prompt.txt", "--json")
    result = from_hub("generate", *args)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["text"] == "false"


def test_a_repo_that_cannot_be_had_is_one_error_until_it_can(hub, from_hub, tmp_path):
    folder = hub.repos.pop("user/ckpt")
    assert_refused(from_hub("convert", "user/ckpt", "adapter"), tmp_path)
    hub.repos["user/ckpt"] = folder
    hub.locked.add("user/ckpt")
    assert_refused(from_hub("convert", "user/ckpt", "adapter"), tmp_path)
    hub.locked.clear()
    assert_converted(from_hub("convert", "user/ckpt", "adapter"), tmp_path)


def test_a_connection_cut_in_mid_file_is_one_error_and_a_second_try_goes_on(
    hub, from_hub, tmp_path
):
    hub.cut.add("encoder.pth")
    assert_refused(from_hub("convert", "user/ckpt", "adapter"), tmp_path)
    hub.cut.clear()
    hub.requests.clear()
    assert_converted(from_hub("convert", "user/ckpt", "adapter"), tmp_path)
    asked = [r.rsplit("/", 1)[-1] for r in hub.requests if r.startswith("HEAD user/ckpt")]
    assert asked == ["encoder.pth"]  # the files that came whole are kept


def assert_refused(result, tmp_path):
    """One error on stderr beside the hub client's own warnings, and nothing written."""
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert (result.code, result.out, len(errors)) == (1, "", 1), result.err
    assert errors[0].startswith("error: user/ckpt ")
    assert "Traceback" not in result.err
    assert list((tmp_path / "work").iterdir()) == []


def assert_converted(result, tmp_path):
    assert result.code == 0, result.err
    assert (tmp_path / "work" / "adapter" / "merge_config.json").is_file()
