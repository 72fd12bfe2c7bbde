"""Quantizes a base for merging, and packs a merge encoder.

The embedding table stays as it is unless it is asked for: the merge encoder reads it, and errors of
a block's K embeddings add up (a 4-bit table moves merged embeddings by 2%).

Source: ``mlx_lm.convert -q``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import compute_bits_per_weight

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import Adapter, check_plain_encoder, read_adapter
from kmerge_mlx.adapters.packing import EncoderQuantization
from kmerge_mlx.adapters.schema import FullConfig
from kmerge_mlx.errors import AdapterError, ModelError, first_line
from kmerge_mlx.model import adapter_of, load_source, merged_embedding, output_head
from kmerge_mlx.source import Source
from kmerge_mlx.tools import fuse

_ALREADY = (
    "is quantized already: give the model that it was made from, or make floating-point weights of "
    "it first (mlx_lm.convert --dequantize)"
)


@dataclass(frozen=True)
class Packing:
    """How a base is quantized; None is the mode's own default (affine: 4 bits, groups of 64)."""

    bits: int | None = None  # of a weight
    group_size: int | None = None  # weights that share a scale
    mode: str = "affine"  # one of MLX's
    embedding: bool = False  # quantize the embedding table as well


@dataclass(frozen=True)
class Quantized:
    """What was written."""

    bits_per_weight: float  # of the whole model, scales included
    tied: bool  # whether the embedding table is the output head as well
    merge_factor: int | None  # K of the adapter that the folder carries; None: none
    drift: fuse.Drift | None  # from what it was made from; None: Ctrl-C ended its measuring


def quantize(
    source: Source,
    mlx_path: str | Path,
    packing: Packing = Packing(),
    encoder_bits: int | None = None,
    *,
    text: str | None = None,
    force: bool = False,
    progress: fuse.Bars | None = None,
) -> Quantized:
    """Writes a base quantized, as a model folder that carries its adapter if there is one.

    The merge encoder stays as it is unless ``encoder_bits`` is given. The drift is measured on
    ``text``, or on random token ids.
    """
    fuse.check_model_destination(mlx_path, "mlx_path", force, source)
    _check(source, packing)
    adapter = None if source.adapter is None else read_adapter(source.adapter, source.merge)
    encoder_packing = _encoder_packing(encoder_bits, adapter)
    model, tokenizer, _ = load_source(source, fold=False)
    comparison = fuse.Comparison(model, tokenizer, text, progress)
    if adapter is not None:  # as the model computes with it
        pad = merged_embedding(model).pad_token_id
        adapter = adapter_of(model, adapter.merge, adapter.tuning)
    del model
    alone = replace(source, adapter=None, merge=None)
    model, tokenizer, config = load_source(alone, lazy=True)
    model, config = quantized(model, config, packing, source.model)
    bits, tied = compute_bits_per_weight(model), output_head(model) is None
    if adapter is not None:
        adapter = replace(adapter, merge=fuse.carried_merge("quantized", source, config, pad))
        adapter = adapter if encoder_packing is None else _packed(adapter, encoder_packing)
    drift = fuse.write_model(mlx_path, source, model, tokenizer, config, adapter, comparison)
    return Quantized(bits, tied, None if adapter is None else source.k, drift)


def quantized(
    model: nn.Module, config: dict[str, Any], packing: Packing, name: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantizes a base alone, in place; gives it back with its new config."""
    # mlx-lm may have found some without `quantization` in the config.
    if base.has_quantized_layers(model):
        raise ModelError(f"{name} {_ALREADY}")
    table, _ = base.find_embedding(model, name)
    own = getattr(model, "quant_predicate", None)

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path == table and not packing.embedding:
            return False
        return True if own is None else own(path, module)

    how = {"mode": packing.mode, "quant_predicate": wanted}
    model, config = base.quantized(model, config, packing.group_size, packing.bits, **how)
    if not base.has_quantized_layers(model):
        found = f"no layer of {name} has rows that groups of {config['quantization']['group_size']}"
        raise ModelError(f"{found} divide: give another `q_group_size`")
    return model, config


def _check(source: Source, packing: Packing) -> None:
    """Refuses what can be known to fail before anything is loaded."""
    if source.config.get("quantization"):
        raise ModelError(f"{source.model} {_ALREADY}")
    try:
        mx.quantize(mx.zeros((1, 128)), packing.group_size, packing.bits, mode=packing.mode)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"MLX cannot quantize {source.model} so: {first_line(error)}") from error


def _encoder_packing(bits: int | None, adapter: Adapter | None) -> EncoderQuantization | None:
    if adapter is not None and isinstance(adapter.tuning, FullConfig):
        found = "the adapter holds whole layers, which a quantized base cannot take"
        raise AdapterError(f"{found}: run `kmerge-mlx fuse` first, and quantize what it writes")
    if bits is None:
        return None
    if adapter is None or adapter.merge.encoder is None:
        what = "no adapter" if adapter is None else "an adapter for K = 1, which has none"
        raise AdapterError(f"`encoder_bits` needs a merge encoder, found {what}")
    if adapter.merge.has_window:
        raise AdapterError("a window encoder is quantized by `kmerge-mlx convert --encoder-bits`")
    check_plain_encoder(adapter.merge, "quantized again")
    widths = {width for _, width in adapter.merge.encoder.layers().values()}
    return EncoderQuantization.of_width(bits, sorted(widths))


def _packed(adapter: Adapter, packing: EncoderQuantization) -> Adapter:
    """An adapter whose encoder's weights are packed; its biases stay as they are."""
    sizes = replace(adapter.merge.encoder, quantization=packing)
    weights = dict(adapter.encoder_weights)
    for layer in sizes.layers():
        parts = mx.quantize(weights[f"{layer}.weight"], packing.group_size, packing.bits)
        names = (f"{layer}.{part}" for part in ("weight", "scales", "biases"))
        weights |= zip(names, parts, strict=True)
    return replace(adapter, merge=replace(adapter.merge, encoder=sizes), encoder_weights=weights)
