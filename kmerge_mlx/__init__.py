"""K-Token Merging on MLX: read a prompt in N/K positions, answer in ordinary tokens.

The public names, loaded on first use so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kmerge_mlx.encoder import MergeEncoder
    from kmerge_mlx.generation.stream import batch_generate, compress, generate, stream_generate
    from kmerge_mlx.model import load
    from kmerge_mlx.prompts.chat_template import ChatTemplate
    from kmerge_mlx.prompts.lay_out import lay_out, lay_out_chat
    from kmerge_mlx.prompts.policy import Layout
    from kmerge_mlx.prompts.segments import Segment

_HOMES = {
    "MergeEncoder": "encoder",
    "batch_generate": "generation.stream",
    "compress": "generation.stream",
    "generate": "generation.stream",
    "stream_generate": "generation.stream",
    "load": "model",
    "Layout": "prompts.policy",
    "ChatTemplate": "prompts.chat_template",
    "Segment": "prompts.segments",
    "lay_out": "prompts.lay_out",
    "lay_out_chat": "prompts.lay_out",
}

__all__ = [
    "ChatTemplate",
    "Layout",
    "MergeEncoder",
    "Segment",
    "__version__",
    "batch_generate",
    "compress",
    "generate",
    "lay_out",
    "lay_out_chat",
    "load",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
