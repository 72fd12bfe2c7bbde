"""Stands in until all commands take tables from ``cli/output.py``; then it goes."""

from __future__ import annotations

from kmerge_mlx.cli.output import aligned, size

__all__ = ["aligned", "size"]
