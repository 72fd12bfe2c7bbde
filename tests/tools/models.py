"""Random bases and adapters as folders, fused or quantized by their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from kmerge_mlx import Segment, load
from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.adapters.schema import LoRAConfig, LoRASpec
from kmerge_mlx.model import load_source, merged_embedding
from kmerge_mlx.source import Source
from kmerge_mlx.tools.fuse import Fused, fuse
from kmerge_mlx.tools.quantize import Packing, Quantized, quantize
from tests.tiny import build, prompts_of, qwen2_config, random_adapter, write_base

PROMPT = prompts_of(1, low=120, high=120)[0]
TEXT = "Tree: JN\n+WO\n++UP\n" * 12  # of fewer positions than the drift's default


def made(
    folder: Path, k: int = 4, head: bool = True, modules: bool = False, **config: object
) -> tuple[Path, Path]:
    """A random base and a random adapter for it; ``modules`` gives each one a scale of its own."""
    config = qwen2_config(**config)
    base = write_base(folder / "base", config)
    plain = {name: value for name, value in config.items() if name != "quantization"}
    adapter = random_adapter(build(plain), k, head=head)
    if modules:  # as rsLoRA and patterns have
        names = sorted({name.rsplit(".", 1)[0] for name in adapter.tuning_weights})
        specs = {name: LoRASpec(4, 4 / (1 + i) ** 0.5) for i, name in enumerate(names)}
        adapter = replace(adapter, tuning=LoRAConfig(2, 0.0, modules=specs))
    save_adapter(adapter, folder / "adapter")
    return base, folder / "adapter"


def fuse_folders(base: Path, adapter: Path, new: Path, **options: object) -> Fused:
    return fuse(Source.find(str(base), str(adapter)), new, **{"text": TEXT} | options)


def quantize_folders(
    base: Path, adapter: Path | None, new: Path, *packing: Packing, **options: object
) -> Quantized:
    return quantize(Source.find(str(base), adapter), new, *packing, **{"text": TEXT} | options)


def alone(base: Path) -> tuple[nn.Module, TokenizerWrapper]:
    """A base without the adapter that its folder may carry, and its tokenizer."""
    return load_source(Source(str(base), base))[:2]


def log_probabilities(base: Path, adapter: Path | None, merge: bool) -> np.ndarray:
    """Of every position of a prompt, read in one go."""
    model, _ = load(str(base), adapter) if adapter else alone(base)
    ids = merged_embedding(model).compress([Segment(PROMPT)]).ids if merge else PROMPT
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def gap(base: Path, adapter: Path, new: Path, merge: bool) -> float:
    """How far a new model's log-probabilities are from those of base and adapter."""
    before = log_probabilities(base, adapter, merge)
    return abs(before - log_probabilities(new, new if merge else None, merge)).max()


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {n: np.array(a) for n, a in mx.load(str(folder / "model.safetensors")).items()}
