"""The one model that a server serves, loaded once and never for a client.

Owns: what mlx-lm's ``ModelProvider`` is given, and when loading is done. Does not know requests.
"""

from __future__ import annotations

from argparse import Namespace
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.server import ModelProvider

from kmerge_mlx.adapters.folder import adapter_folder, read_merge_config
from kmerge_mlx.base import find_embedding
from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.errors import ServeError, of_mlx_lm
from kmerge_mlx.model import load, merged_embedding
from kmerge_mlx.prompts.policy import Layout, chosen
from kmerge_mlx.serving.settings import ServeConfig


class PinnedModel(ModelProvider):
    """mlx-lm's model provider, with a model that no request can change.

    Args:
        config: The server's settings.
        base: Base model, as for :func:`kmerge_mlx.load`.
        adapter_path: Adapter folder, or None: nothing is merged.
        k: Merge factor, or None for the adapter's only one.
        trust_remote_code: Let the base's own Python files run.
    """

    def __init__(
        self,
        config: ServeConfig,
        base: str,
        adapter_path: str | Path | None = None,
        k: int | None = None,
        trust_remote_code: bool = False,
    ):
        super().__init__(_host_arguments(config, base, trust_remote_code))
        self.config = config
        self.name = (
            base if base == BUNDLED or not Path(base).is_dir() else Path(base).resolve().name
        )
        self.stored_layout: Layout | None = None
        self.layout = chosen(None)
        self.vocab_size = 0
        self.loaded: Future[None] = Future()
        self._source = (base, adapter_path, k)
        self._trust_remote_code = trust_remote_code

    def load_default(self) -> None:
        """Nothing: mlx-lm asks for it when the model is there."""

    def load_once(self) -> None:
        """Loads the model, in the thread that will use it; :attr:`loaded` says how that went."""
        try:
            self._load_pinned()
        except BaseException as error:
            self.loaded.set_exception(error)
        else:
            self.loaded.set_result(None)

    def load(self, *named: Any) -> tuple[nn.Module, Any]:
        """The model and its tokenizer, whatever a client named."""
        return self.model, self.tokenizer

    @property
    def merge_factor(self) -> int:
        """K; 1 without an adapter."""
        embedding = merged_embedding(self.model)
        return 1 if embedding is None else embedding.merge_factor

    def _load_pinned(self) -> None:
        base, adapter_path, k = self._source
        config = self.config
        if adapter_path is not None:
            self.stored_layout = read_merge_config(adapter_folder(adapter_path, k)).layout
        self.layout = chosen(
            self.stored_layout, config.merges, config.merge_threshold, config.chat_template
        )
        model, tokenizer = load(
            base,
            adapter_path,
            k,
            trust_remote_code=self._trust_remote_code,
            max_blocks=config.max_blocks,
        )
        if config.chat_template_args and not (
            self.layout.chat_template and tokenizer.has_chat_template
        ):
            raise ServeError("--chat-template-args: needs a chat template, and none is applied")
        if config.top_k >= (vocab_size := _table_size(model)):
            raise ServeError(
                f"--top-k {config.top_k}: the vocabulary has {vocab_size:,} tokens, give fewer"
            )
        _check_kv_bits(config, model)
        self.model, self.tokenizer, self.vocab_size = model, tokenizer, vocab_size
        self.model_key = (self.name, None, None)
        caches = make_prompt_cache(model)
        self.is_batchable = all(hasattr(cache, "merge") for cache in caches)


def _table_size(model: nn.Module) -> int:
    """V, the number of rows of the embedding table."""
    embedding = merged_embedding(model)
    if embedding is None:
        return find_embedding(model, "the model")[1].weight.shape[0]
    return embedding.vocab_size


def _check_kv_bits(config: ServeConfig, model: nn.Module) -> None:
    """Quantizes a KV cache, so that no request is the first to find out that it cannot be."""
    cache = make_prompt_cache(model)
    model(mx.array([[0]]), cache=cache)
    try:
        maybe_quantize_kv_cache(cache, 0, config.kv_group_size, config.kv_bits)
    except (ValueError, NotImplementedError) as error:
        raise ServeError(of_mlx_lm(error)) from error


def _host_arguments(config: ServeConfig, base: str, trust_remote_code: bool) -> Namespace:
    """What mlx-lm's server reads of its command line."""
    return Namespace(
        model=base,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=0,
        trust_remote_code=trust_remote_code,
        chat_template="",
        use_default_chat_template=False,
        pipeline=False,
        allowed_origins=list(config.allowed_origins),
        chat_template_args=dict(config.chat_template_args),
        **{
            name: getattr(config, name)
            for name in (
                *("temp", "top_p", "top_k", "min_p", "max_tokens"),
                *("decode_concurrency", "prompt_concurrency", "prefill_step_size"),
                *("prompt_cache_size", "prompt_cache_bytes"),
                *("kv_bits", "kv_group_size", "quantized_kv_start"),
            )
        },
    )
