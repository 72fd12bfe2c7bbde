"""Loads a base model with an adapter on it: mlx-lm's own model, which now reads virtual tokens.

Everything in mlx-lm that takes token ids takes what :func:`load` returns. :func:`wire` puts a fresh
adapter on a model for training, and :func:`adapter_of` takes the trained one off again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from kmerge_mlx import base, bundled, window_encoder
from kmerge_mlx.adapters import lora
from kmerge_mlx.adapters.folder import (
    ENCODER,
    HEAD,
    Adapter,
    check_plain_encoder,
    read_adapter,
    share_tuning,
)
from kmerge_mlx.adapters.schema import FullConfig, LoRAConfig, LoRASpec, MergeConfig, Tuning
from kmerge_mlx.config import MAX_BLOCKS, is_int
from kmerge_mlx.encoder import Encoder, MergeEncoder
from kmerge_mlx.errors import AdapterError, ModelError, findings, first_line
from kmerge_mlx.files import check_memory
from kmerge_mlx.multi_encoder import MultiEncoder
from kmerge_mlx.prompts.segments import MergedText
from kmerge_mlx.source import Source, check_unmerged
from kmerge_mlx.virtual_tokens import MergedEmbedding
from kmerge_mlx.window_encoder import WindowEncoder


def load(
    path_or_hf_repo: str,
    adapter_path: str | Path | None = None,
    k: int | None = None,
    *,
    tokenizer_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    trust_remote_code: bool = False,
    max_blocks: int = MAX_BLOCKS,
) -> tuple[nn.Module, TokenizerWrapper] | tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Loads a base model and an adapter, as ``mlx_lm.load`` does (the adapter comes second here).

    Args:
        path_or_hf_repo: Base model: a folder, a hub repo id (``user/name@revision``), or
            ``bundled``.
        adapter_path: Adapter folder, a hub repo id, or ``bundled``; for the adapter that the base's
            folder carries, that folder again. None loads the base alone, and prompts are then read
            unmerged.
        k: Merge factor wanted; None takes the adapter's only one.
        tokenizer_config: Further arguments for the tokenizer.
        revision: Hub revision of the base, where its id names none.
        lazy: Leave the base's weights unevaluated: the model stays with the thread that loads it.
        return_config: Give the base's config as well, spelled as mlx-lm reads it.
        trust_remote_code: Let the base's own Python files run.
        max_blocks: Slots of the block table.

    Returns:
        The model and its tokenizer; with ``return_config`` its config as the third.

    Raises:
        ModelError: The base cannot be found, loaded or given virtual ids.
        AdapterError: The adapter is torn, has no such K, or is for another base.
    """
    if adapter_path is not None:
        source = Source.find(path_or_hf_repo, adapter_path, k, trust_remote_code, revision)
    else:
        check_unmerged(k, str(path_or_hf_repo))
        path = base.resolve(path_or_hf_repo, revision)
        source = Source(path_or_hf_repo, path, trust_remote_code=trust_remote_code)
    model, tokenizer, config = load_source(source, tokenizer_config, lazy, max_blocks)
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def load_source(
    source: Source,
    tokenizer_config: Mapping[str, Any] | None = None,
    lazy: bool = False,
    max_blocks: int = MAX_BLOCKS,
    fold: bool = True,
    several: Sequence[Source] = (),
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Loads a source, as :func:`load` does: the model, its tokenizer, and the base's config.

    Without ``fold`` the LoRA stays as it is stored, to be saved or trained. With ``several``
    sources, of which it is one, the model has the encoders of all: they may differ in nothing else.
    """
    encoder = _encoders(several) if several else None
    adapter = None if source.adapter is None else read_adapter(source.adapter, source.merge)
    config, path, name = source.config, source.path, source.model
    trust = source.trust_remote_code
    if adapter is not None:
        check_fit(adapter, config, name)
    if not lazy:
        check_memory(path.glob("model*.safetensors"), ModelError)
    try:
        model, config = load_model(path, lazy, model_config=config, trust_remote_code=trust)
        # Not evaluated: it shows what of the config has a wrong type.
        model(mx.array([[0]]), cache=make_prompt_cache(model))
    except base.LOAD_ERRORS as error:
        raise ModelError(f"cannot load {name}: {first_line(error)}") from error
    tokenizer = read_tokenizer(source, tokenizer_config)
    # mlx-lm's samplers index the logits with these.
    rows = base.table_rows(model)
    tokenizer.eos_token_ids = {i for i in tokenizer.eos_token_ids if is_int(i) and i < rows}
    # Plain attribute, not a parameter: generation compares prompts with it.
    model.context_length = base.context_length(config)
    if adapter is not None:
        attach(model, adapter, padding_of(adapter, tokenizer), name, max_blocks, encoder)
    widen(model, path)
    if fold and adapter is not None:
        fold_lora(model)
    if not lazy:
        mx.eval(model.state)  # what waits belongs to the thread that asked for it
    return model, tokenizer, config


def _encoders(sources: Sequence[Source]) -> MultiEncoder:
    """The encoders of adapters that are alike but for them."""
    adapters = {s.k: read_adapter(s.adapter, s.merge) for s in sources}
    rest = [replace(a.merge, encoder=None, provenance={}) for a in adapters.values()]
    windows = any(a.merge.has_window for a in adapters.values())
    if windows or any(r != rest[0] for r in rest) or not share_tuning([*adapters.values()]):
        have = ", ".join(map(str, adapters))
        raise AdapterError(
            f"{sources[0].adapter_path} holds adapters for K = {have}, which were not trained "
            "together: choose one with `k`"
        )
    configs = {k: adapter.merge.encoder for k, adapter in adapters.items()}
    return MultiEncoder.make(configs, {k: a.encoder_weights for k, a in adapters.items()})


def read_tokenizer(source: Source, options: Mapping[str, Any] | None = None) -> TokenizerWrapper:
    """The tokenizer of a source, which knows how text that merges becomes tokens."""
    about = (source.config, source.model, source.trust_remote_code)
    tokenizer = base.read_tokenizer(source.path, *about, options)
    if source.merge is not None and source.merge.has_window:
        own, folder = source.merge.encoder, source.adapter / ENCODER
        encoders = base.read_tokenizer(folder, base.read_config(folder), str(folder))
        tokenizer.merged_text = MergedText(encoders, own.start_token_id, own.end_token_id)
    return tokenizer


def padding_of(adapter: Adapter, tokenizer: Any) -> int:
    """The token that fills the last block: the adapter's, or else the tokenizer's default."""
    own = adapter.merge.pad_token_id
    return base.default_pad_token_id(tokenizer) if own is None else own


def widen(model: nn.Module, path: Path) -> None:
    """Makes the bundled base, whose file is small float16, compute in float32, its adapter too."""
    if path == bundled.BASE:
        model.set_dtype(mx.float32, lambda dtype: dtype == mx.float16)
        if (merged := merged_embedding(model)) is not None:
            merged.forget_blocks()  # the rows are not parameters, and still have the old dtype


def fold_lora(model: nn.Module) -> None:
    """Folds scale and dtype into the factors of a model's LoRA, in place, for inference alone."""
    merged = merged_embedding(model)
    lora.fold(model, merged.dtype)
    merged.fold_head_lora()


def check_fit(adapter: Adapter, config: Mapping[str, Any], name: str) -> None:
    """Refuses a base model, with this config and this name, that an adapter was not made for."""
    made_for = adapter.merge.base
    if problems := made_for.differences(base.fingerprint(config)):
        known = f" (it was made for {made_for.id})" if made_for.id else ""
        raise AdapterError(findings(f"the adapter does not fit {name}{known}", problems))


def attach(
    model: nn.Module,
    adapter: Adapter,
    pad_token_id: int,
    name: str = "the base model",
    max_blocks: int = MAX_BLOCKS,
    encoder: Encoder | None = None,
) -> None:
    """Puts an adapter on a freshly loaded base model, in place, ready to generate.

    An ``encoder`` with its weights takes the place of the adapter's own.
    """
    own = encoder
    if own is None and adapter.encoder_folder is not None:
        own = window_encoder.load(
            adapter.merge.encoder, adapter.encoder_folder, adapter.encoder_weights
        )
    merged = wire(model, adapter.merge, adapter.tuning, pad_token_id, name, max_blocks, own)
    found = (adapter.tuning_weights, adapter.encoder_weights, adapter.head_weights)
    tuned, weights, head = found
    problems = lora.tensor_problems(_tuned(model, adapter.merge, adapter.tuning), tuned)
    carrier = _head(model, merged)
    if adapter.merge.head_lora is not None:
        problems += [f"{HEAD}.{p}" for p in lora.tensor_problems(_lora_parts(carrier), head)]
    if problems:
        raise AdapterError(findings(f"the adapter does not fit {name}", problems))
    model.load_weights(list(tuned.items()), strict=False)
    carrier.load_weights(list(head.items()), strict=False)
    if isinstance(merged.encoder, MergeEncoder):  # its shapes were checked where its file was read
        merged.encoder.load_weights(list(weights.items()))
    mx.eval(found)
    if own is not None:
        mx.eval(own.parameters())
    model.eval()


def wire(
    model: nn.Module,
    merge: MergeConfig,
    tuning: Tuning,
    pad_token_id: int,
    name: str = "the base model",
    max_blocks: int = MAX_BLOCKS,
    encoder: Encoder | None = None,
) -> MergedEmbedding:
    """Puts a fresh adapter on a loaded base model, called ``name``, in place.

    A fresh adapter reads a block as the mean of its embeddings and changes nothing else: the
    encoder's W3 and every LoRA B are zero, every LoRA A is random. All tensors are float32. An
    ``encoder`` that was loaded takes the fresh one's place.
    """
    path, embedding = base.find_embedding(model, name)
    if not 0 <= pad_token_id < embedding.weight.shape[0]:
        raise AdapterError(f"pad_token_id {pad_token_id} is outside the vocabulary of {name}")
    if encoder is None and merge.encoder is not None:
        encoder = MergeEncoder(merge.encoder)
    merged = MergedEmbedding(embedding, encoder, pad_token_id, max_blocks)
    if encoder is not None and merge.encoder.hidden_size != merged.hidden_size:
        d = merge.encoder.hidden_size
        raise AdapterError(f"{name} has hidden_size {merged.hidden_size}, the encoder has {d}")
    if isinstance(tuning, LoRAConfig):
        lora.attach(model, tuning)
    else:
        lora.check_full(model, tuning, name)
    if (spec := merge.head_lora) is not None:
        dropout = tuning.dropout if isinstance(tuning, LoRAConfig) else 0.0
        if (head := output_head(model)) is None:
            merged.add_head_lora(spec, dropout)
        else:
            lora.attach(model, LoRAConfig(0, dropout, modules={head[0]: spec}))
    model.update_modules(tree_unflatten([(path, merged)]))
    if getattr(model, "model_type", None) not in base.PROVEN:
        _probe(model, merged, name)
    return merged


def fresh_lora(
    model: nn.Module,
    spec: LoRASpec,
    num_layers: int,
    dropout: float = 0.0,
    keys: Sequence[str] | None = None,
) -> tuple[LoRAConfig, LoRASpec | None]:
    """LoRA as a fresh adapter has it: on every linear layer and the output head, or on ``keys``.

    The second is the LoRA of a tied head, for which mlx-lm has no place.
    """
    keys = [*lora.default_keys(model, num_layers), HEAD] if keys is None else list(keys)
    head = output_head(model)
    tied_head = HEAD in keys and head is None
    if HEAD in keys:
        keys = [key for key in keys if key != HEAD] + ([] if head is None else [head[0]])
    return LoRAConfig(num_layers, dropout, spec, tuple(keys)), spec if tied_head else None


def adapter_of(model: nn.Module, merge: MergeConfig, tuning: Tuning) -> Adapter:
    """The adapter that a wired model carries now, ready to be saved; ``merge`` may say more."""
    merged = unfolded(model)
    encoder, folder = merged.encoder, None
    if isinstance(encoder, WindowEncoder):
        encoder, folder = encoder.projection, encoder.folder
    if isinstance(encoder, MultiEncoder):
        encoder = encoder.of(merge.merge_factor)
    encoder = {} if encoder is None else dict(tree_flatten(encoder.parameters()))
    head = {} if merge.head_lora is None else _lora_parts(_head(model, merged))
    return Adapter(merge, tuning, _tuned(model, merge, tuning), encoder, head, folder)


def unfreeze(model: nn.Module, tuning: Tuning, *, encoder_only: bool = False) -> None:
    """Makes exactly what an adapter holds trainable; for a warm-up, only its encoder."""
    merged = unfolded(model)
    model.freeze()
    if merged.encoder is not None:
        check_plain_encoder(MergeConfig(merged.encoder.config), "trained")
        merged.encoder.unfreeze()
    elif encoder_only:
        raise AdapterError("merge factor 1 has no encoder to train alone: leave its warm-up out")
    if encoder_only:
        return
    for module in [merged, *(m for _, m in lora.layers(model))]:
        module.unfreeze(recurse=False, keys=[*lora.LORA_PARTS])
    if isinstance(tuning, FullConfig):
        for layer in lora.last_layers(model, tuning.num_layers):
            layer.unfreeze()


def unfolded(model: nn.Module) -> MergedEmbedding:
    """The wrapped embedding of a model whose LoRA is as it is stored, or an AdapterError."""
    merged = merged_embedding(model)
    if merged.folded:
        raise AdapterError("this model's LoRA is folded for inference: load it without `fold`")
    return merged


def merged_embedding(model: nn.Module) -> MergedEmbedding | None:
    """The wrapped embedding of a model, or None for a base model without an adapter."""
    return next((m for _, m in model.named_modules() if isinstance(m, MergedEmbedding)), None)


def output_head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The output head's path and module, or None where the embedding table is the head."""
    named = model.named_modules()
    return next(((path, m) for path, m in named if path.rsplit(".", 1)[-1] == HEAD), None)


def _tuned(model: nn.Module, merge: MergeConfig, tuning: Tuning) -> dict[str, mx.array]:
    """The tensors of a wired model that ``adapters.safetensors`` holds, by full name."""
    if isinstance(tuning, FullConfig):
        return lora.full_parameters(model, tuning)
    found = lora.parameters(model)
    if merge.head_lora is None:
        return found
    return {name: array for name, array in found.items() if name.split(".")[-2] != HEAD}


def _head(model: nn.Module, merged: MergedEmbedding) -> nn.Module:
    """The module with the output head's LoRA: the head, or the embedding of a tied model."""
    head = output_head(model)
    return merged if head is None else head[1]


def _lora_parts(module: nn.Module) -> dict[str, mx.array]:
    return {name: module[name] for name in lora.LORA_PARTS}


def _probe(model: nn.Module, merged: MergedEmbedding, name: str) -> None:
    """Checks that a virtual id whose row is a token's embedding gives that token's logits.

    One forward pass over two one-token rows. It runs for architectures that the tests do not cover,
    because some look at ids, or at the head, in places that the module tree does not show.
    """
    merged.head_calls, token = 0, merged.pad_token_id
    # Without an encoder a virtual id is never read: only the head is tried then.
    virtual = token if merged.encoder is None else merged.vocab_size
    with merged.reading(merged.embedding(mx.array([token]))):
        logits = model(mx.array([[token], [virtual]])).astype(mx.float32)
    gap, size = mx.abs(logits[0] - logits[1]).max().item(), mx.abs(logits[0]).max().item()
    if not gap <= 1e-2 * max(size, 1e-6):
        raise ModelError(
            f"{name} looks at token ids outside its embedding table (a merged block in a token's "
            f"place moves the logits by {gap:.2g}): it cannot read merged prompts"
        )
    if "lora_a" in merged and not merged.head_calls:
        raise ModelError(
            f"{name} does not use its embedding table through as_linear, so the output head's "
            "LoRA would be ignored: use an adapter without lm_head"
        )
