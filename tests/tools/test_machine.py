"""What a report says of the machine, on Linux and on a Mac that is made up."""

from __future__ import annotations

import json
import platform
import subprocess
from types import SimpleNamespace

import pytest

from kmerge_mlx.tools import machine
from kmerge_mlx.tools.machine import describe_machine, usable_memory

PMSET = """\
Now drawing from 'Battery Power'
 -InternalBattery-0 (id=22806627)\t83%; discharging; 5:32 remaining present: true
"""
SAID = {
    "hw.model": "Mac14,10\n",
    "machdep.cpu.brand_string": "Apple M2 Pro\n",
    "batt": PMSET,
}
KEYS = {
    *("backend", "device", "machine", "model", "processor", "system", "memory_bytes"),
    *("working_set_bytes", "power", "tf32", "python", "mlx", "mlx_lm", "kmerge_mlx"),
}


@pytest.fixture
def mac(monkeypatch) -> dict[str, str]:
    """Makes this machine a Mac; what its programs print may be changed."""
    said = dict(SAID)

    def run(line, **options):
        assert options["timeout"]
        if line[-1] not in said:
            raise FileNotFoundError(line[0])
        return SimpleNamespace(returncode=0, stdout=said[line[-1]])

    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(
        machine.mx,
        "device_info",
        lambda _: {"device_name": "Apple M2 Pro", "max_recommended_working_set_size": 22_906_503},
    )
    return said


def test_linux_has_no_model_and_no_power_source(monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(subprocess, "run", None)  # nothing is asked
    release = {"PRETTY_NAME": "Debian GNU/Linux 12 (bookworm)"}
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    found = describe_machine()
    assert set(found) == KEYS
    assert (found["model"], found["power"]) == ("unknown", "unknown")
    assert found["system"] == "Linux (Debian GNU/Linux 12 (bookworm))"
    assert found["memory_bytes"] > 1 << 28
    json.dumps(found)


@pytest.mark.usefixtures("mac")
def test_a_mac_says_its_chip_model_working_set_and_power_source():
    found = describe_machine()
    assert set(found) == KEYS
    assert (found["processor"], found["model"]) == ("Apple M2 Pro", "Mac14,10")
    assert (found["system"], found["machine"]) == ("macOS 15.1", "arm64")
    assert (found["working_set_bytes"], found["power"]) == (22_906_503, "Battery Power")
    assert usable_memory() == 22_906_503


@pytest.mark.parametrize(
    ("said", "power"),
    [
        ("Now drawing from 'AC Power'\n -InternalBattery-0 ...", "AC Power"),
        ("Now drawing from 'UPS Power'", "UPS Power"),
        ("Now drawing from 'the sun'", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_power_source_is_what_pmset_names_and_nothing_else(mac, said, power):
    mac["batt"] = said
    assert describe_machine()["power"] == power


def fails(error: Exception | None):
    def run(*_, **__):
        if error is None:
            return SimpleNamespace(returncode=1, stdout="sysctl: unknown oid")
        raise error

    return run


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("sysctl"),
        PermissionError("pmset"),
        subprocess.TimeoutExpired("pmset", 10),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        None,
    ],
)
def test_a_mac_whose_programs_fail_is_described_all_the_same(monkeypatch, error):
    monkeypatch.setattr(subprocess, "run", fails(error))
    found = describe_machine()
    assert (found["model"], found["power"]) == ("unknown", "unknown")
    assert found["processor"] == "Apple M2 Pro"  # MLX knows it too


def test_a_linux_that_does_not_name_itself_is_described_all_the_same(monkeypatch):
    def missing():
        raise FileNotFoundError("os-release")

    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(platform, "freedesktop_os_release", missing)
    assert describe_machine()["system"] == platform.system()


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "1 (MLX's default)"), ("0", "0"), ("1", "1"), ("/Users/ada", "unknown")],
)
def test_tf32_is_as_the_environment_says(monkeypatch, value, said):
    if value is None:
        monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    else:
        monkeypatch.setenv("MLX_ENABLE_TF32", value)
    assert describe_machine()["tf32"] == said
