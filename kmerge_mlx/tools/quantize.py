"""A base model quantized for merging, with the adapter it is to be read with.

Owns: which layers are quantized, the packing of a merge encoder, and what is refused. Does not know
the command line.

The embedding table is left alone unless it is asked for: the merge encoder reads it, and errors of
a block's K embeddings add up (a 4-bit table moves merged embeddings by 2%).

Source: ``mlx_lm.convert -q``.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import compute_bits_per_weight, quantize_model

from kmerge_mlx import base
from kmerge_mlx.adapters.folder import Adapter, adapter_folder, check_not_quantized, load_adapter
from kmerge_mlx.adapters.schema import EncoderQuantization, QuantizeConfig
from kmerge_mlx.adapters.tuning import FullConfig
from kmerge_mlx.errors import AdapterError, ModelError, first_line
from kmerge_mlx.model import adapter_of, load, merged_embedding, output_head
from kmerge_mlx.tools import drift
from kmerge_mlx.tools.drift import Drift, Progress
from kmerge_mlx.tools.model_folder import (
    carried_merge,
    check_model_destination,
    made_by,
    reload,
    write_model,
    writing,
)

MLX_PATH = "--mlx-path"


@dataclass(frozen=True)
class Quantized:
    """What was written.

    Args:
        bits_per_weight: Of the whole model, scales included.
        tied: Whether the embedding table is the output head as well.
        merge_factor: K of the adapter that the folder carries, or None: it carries none.
        drift: How far it is from what it was made from.
    """

    bits_per_weight: float
    tied: bool
    merge_factor: int | None
    drift: Drift


def quantize(
    path_or_hf_repo: str,
    mlx_path: str | Path,
    config: QuantizeConfig | None = None,
    adapter_path: str | Path | None = None,
    k: int | None = None,
    *,
    text: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], Progress] | None = None,
) -> Quantized:
    """Writes a base quantized, as a model folder that carries its adapter if there is one.

    Args:
        path_or_hf_repo: Base model, a folder, a hub repo id, or ``bundled``.
        mlx_path: The folder to write.
        config: How to quantize; None is the defaults.
        adapter_path: Adapter folder, or None.
        k: Merge factor, or None: the adapter's only one.
        text: What the drift is measured on, or None: random token ids.
        force: Replace a model folder at ``mlx_path``.
        trust_remote_code: Let the base's own Python files run.
        progress: A label to what is called with (positions read, positions in all).

    Returns:
        What was written, and its drift.

    Raises:
        AdapterError: The adapter is torn, has no such K, is for another base, or cannot be used
            with a quantized one.
        ModelError: The base cannot be loaded or quantized, or the folder cannot be written.
        PromptError: The text has no token.
    """
    config = config or QuantizeConfig()
    where = None if adapter_path is None else adapter_folder(adapter_path, k)
    source, name = base.resolve(path_or_hf_repo), str(path_or_hf_repo)
    check_model_destination(mlx_path, force, MLX_PATH, [source, where])
    _check(base.read_config(source), config, name)
    adapter = None if where is None else load_adapter(where)
    packing = _packing(config, adapter)
    bar = progress or (lambda _: lambda *_: None)
    trusted = {"trust_remote_code": trust_remote_code}
    model, tokenizer = load(name, where, **trusted)
    sample = drift.sample(model, tokenizer, text)
    before = drift.read(model, sample, bar("Reading the base"))
    if adapter is not None:  # as the model computes with it
        pad = merged_embedding(model).pad_token_id
        adapter = adapter_of(model, adapter.merge, adapter.tuning)
    del model
    model, tokenizer, settings = load(name, lazy=True, return_config=True, **trusted)
    model, settings = quantized(model, settings, config, name)
    bits, tied = compute_bits_per_weight(model), output_head(model) is None
    if adapter is not None:
        made = made_by("quantized", name, adapter_path)
        adapter = replace(adapter, merge=carried_merge(adapter.merge, settings, pad, made))
        adapter = adapter if packing is None else _packed(adapter, packing)
    with writing(mlx_path) as folder:
        write_model(folder, model, tokenizer, settings, source, adapter)
        del model
        after = drift.read(reload(folder, trust_remote_code), sample, bar("Reading quantized"))
        found = drift.compare(before, after)
    return Quantized(bits, tied, None if adapter is None else adapter.merge.merge_factor, found)


def quantized(
    model: nn.Module, settings: dict[str, Any], config: QuantizeConfig, name: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantizes a base in place.

    Args:
        model: A base alone.
        settings: Its own config.
        config: How.
        name: What to call it in an error.

    Returns:
        The model and its new config.

    Raises:
        ModelError: It is quantized already, mlx-lm refuses the settings, or they fit no layer.
    """
    if _has_quantized_layers(model):
        raise _quantized_already(name)
    table, _ = base.find_embedding(model, name)
    own = getattr(model, "quant_predicate", None)

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path == table and not config.embedding:
            return False
        return True if own is None else own(path, module)

    try:
        with redirect_stdout(io.StringIO()):  # mlx-lm says how many bits it took
            model, settings = quantize_model(
                model,
                settings,
                config.group_size,
                config.bits,
                mode=config.mode,
                quant_predicate=wanted,
            )
    except (ValueError, KeyError, RuntimeError) as error:
        raise _refused(name, error) from error
    if not _has_quantized_layers(model):
        raise ModelError(
            f"no layer of {name} has rows that groups of {settings['quantization']['group_size']} "
            "divide: give another --q-group-size"
        )
    return model, settings


def _check(settings: dict[str, Any], config: QuantizeConfig, name: str) -> None:
    """Refuses what can be known to fail before anything is loaded."""
    if settings.get("quantization"):
        raise _quantized_already(name)
    try:
        mx.quantize(mx.zeros((1, 128)), config.group_size, config.bits, mode=config.mode)
    except (ValueError, RuntimeError) as error:
        raise _refused(name, error) from error


def _refused(name: str, error: Exception) -> ModelError:
    return ModelError(f"MLX cannot quantize {name} so: {first_line(error)}")


def _has_quantized_layers(model: nn.Module) -> bool:
    return any(path.endswith(".scales") for path, _ in tree_flatten(model.parameters()))


def _quantized_already(name: str) -> ModelError:
    return ModelError(
        f"{name} is quantized already: give the model that it was made from, or make "
        "floating-point weights of it first (mlx_lm.convert --dequantize)"
    )


def _packing(config: QuantizeConfig, adapter: Adapter | None) -> EncoderQuantization | None:
    """How the merge encoder will be packed, after everything that can be refused by then."""
    if adapter is not None and isinstance(adapter.tuning, FullConfig):
        raise AdapterError(
            "the adapter holds whole layers, which a quantized base cannot take: run "
            "`kmerge-mlx fuse` first, and quantize what it writes"
        )
    if config.encoder_bits is None:
        return None
    if adapter is None or adapter.merge.encoder is None:
        what = "no adapter" if adapter is None else "an adapter for K = 1, which has none"
        raise AdapterError(f"--encoder-bits needs a merge encoder, found {what}")
    check_not_quantized(adapter.merge, "quantized again")
    widths = [inner for _, inner in adapter.merge.encoder.layers().values()]
    return EncoderQuantization.of_width(config.encoder_bits, widths)


def _packed(adapter: Adapter, packing: EncoderQuantization) -> Adapter:
    """An adapter whose encoder's weights are packed; its biases stay as they are."""
    sizes = replace(adapter.merge.encoder, quantization=packing)
    weights = {}
    for layer in sizes.layers():
        parts = mx.quantize(
            adapter.encoder_weights[f"{layer}.weight"], packing.group_size, packing.bits
        )
        names = [f"{layer}.{part}" for part in ("weight", "scales", "biases")]
        weights |= dict(zip(names, parts, strict=True))
        weights[f"{layer}.bias"] = adapter.encoder_weights[f"{layer}.bias"]
    return replace(adapter, merge=replace(adapter.merge, encoder=sizes), encoder_weights=weights)
