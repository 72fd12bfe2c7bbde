"""What several modules serve, and the folder in which its prompt caches are kept."""

from __future__ import annotations

import pytest


@pytest.fixture
def model(base_path, adapter_path):
    return base_path, adapter_path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept"
