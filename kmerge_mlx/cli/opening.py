"""Stands in until ``serve`` takes ``note_layout`` from ``cli/output.py``; then it goes."""

from __future__ import annotations

from kmerge_mlx.cli.output import note_layout

__all__ = ["note_layout"]
