"""K-Token Merging on MLX: read a prompt in N/K positions, answer in ordinary tokens.

The public names, loaded on first use so that importing the package stays cheap. (That is why the
module is ``generation``: a submodule named ``generate`` would take the function's place.)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kmerge_mlx._version import __version__

if TYPE_CHECKING:
    from kmerge_mlx.encoder import MergeEncoder
    from kmerge_mlx.generation import batch_generate, compress, generate, stream_generate
    from kmerge_mlx.layout import Layout
    from kmerge_mlx.model import load
    from kmerge_mlx.prompt import lay_out, lay_out_chat
    from kmerge_mlx.segments import Segment
    from kmerge_mlx.template import ChatTemplate

_HOMES = {
    "MergeEncoder": "encoder",
    "batch_generate": "generation",
    "compress": "generation",
    "generate": "generation",
    "stream_generate": "generation",
    "load": "model",
    "Layout": "layout",
    "ChatTemplate": "template",
    "Segment": "segments",
    "lay_out": "prompt",
    "lay_out_chat": "prompt",
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
