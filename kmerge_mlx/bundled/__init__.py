"""Where the model that comes with the package lies: a tiny base, and adapters for it (README.md).

``bundled`` stands for it wherever a model or an adapter is named; a folder of that name in the
working directory is reached as ``./bundled``.
"""

from __future__ import annotations

from pathlib import Path

BUNDLED = "bundled"
DEFAULT_K = 4
"""The merge factor of the bundled adapters that is used where none is named."""

BASE = Path(__file__).parent / "base"
ADAPTERS = Path(__file__).parent / "adapters"
