"""Stands in until ``fuse``, ``quantize`` and ``serve`` are on the settings; then it goes."""

from __future__ import annotations

import json
from typing import Any

import typer

from kmerge_mlx.cli.inputs import read_prompt

__all__ = ["json_object", "read_prompt"]


def json_object(text: str | None, flag: str = "--chat-template-config") -> dict[str, Any]:
    """What an option that takes a JSON object holds; empty without it."""
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=flag) from None
    if not isinstance(value, dict):
        raise typer.BadParameter("not a JSON object", param_hint=flag)
    return value
