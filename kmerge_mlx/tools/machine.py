"""Says what machine figures were measured on, and nothing of who owns it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from typing import Any

import mlx.core as mx
import mlx_lm

from kmerge_mlx import __version__
from kmerge_mlx.config import USABLE_SHARE
from kmerge_mlx.files import machine_memory

UNKNOWN = "unknown"


def usable_memory() -> int:
    """Bytes that a model may take: Metal's recommended working set, or a share of the memory."""
    return _working_set() or int(USABLE_SHARE * machine_memory())


def describe_machine() -> dict[str, Any]:
    """Machine, system, memory (bytes), power, TF32 and versions; what cannot be read is unknown.

    It holds no name of a user, a host or a folder, and no serial number.
    """
    device = mx.default_device()
    gpu = "Metal" if mx.metal.is_available() else "CUDA"
    return {
        "backend": "CPU" if device == mx.Device(mx.cpu) else gpu,
        "device": str(device),
        "machine": platform.machine(),
        "model": _said("sysctl", "-n", "hw.model") or UNKNOWN,
        "processor": _said("sysctl", "-n", "machdep.cpu.brand_string")
        or str(mx.device_info(device).get("device_name", UNKNOWN)),
        "system": _system(),
        "memory_bytes": machine_memory(),
        "working_set_bytes": _working_set(),
        "power": _power(),
        "tf32": _tf32(),
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
        "kmerge_mlx": __version__,
    }


def _said(*line: str) -> str:
    """What one of macOS's programs prints; nothing elsewhere, and where it fails."""
    if sys.platform != "darwin":
        return ""
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _working_set() -> int | None:
    """Bytes that Metal recommends to use at most; None without Metal."""
    return mx.device_info(mx.default_device()).get("max_recommended_working_set_size")


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0] or UNKNOWN}"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return platform.system()
    return f"{platform.system()} ({release.get('PRETTY_NAME', UNKNOWN)})"


def _power() -> str:
    """``AC Power`` or ``Battery Power``, as pmset says it in its first line."""
    found = re.match(r"Now drawing from '(\w+ Power)'", _said("pmset", "-g", "batt"))
    return found[1] if found else UNKNOWN


def _tf32() -> str:
    """Whether MLX may multiply float32 matrices at a lower precision; it may by default."""
    value = os.environ.get("MLX_ENABLE_TF32")
    if value is None:
        return "1 (MLX's default)"
    return value if re.fullmatch(r"-?\d{1,3}", value) else UNKNOWN
