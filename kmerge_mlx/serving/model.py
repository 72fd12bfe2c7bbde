"""The one model that a server serves: loaded once, and never changed by a client."""

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

from kmerge_mlx.base import find_embedding
from kmerge_mlx.errors import ServeError, of_mlx_lm
from kmerge_mlx.model import load_source, merged_embedding
from kmerge_mlx.prompts.lay_out import chosen
from kmerge_mlx.serving.settings import ServeSettings
from kmerge_mlx.settings import parse_size
from kmerge_mlx.source import Source


class PinnedModel(ModelProvider):
    """mlx-lm's model provider with a fixed model.

    Args:
        settings: The server's settings.
        source: The base model and the adapter; without one nothing is merged.
    """

    def __init__(self, settings: ServeSettings, source: Source):
        super().__init__(_host_arguments(settings))
        self.settings, self.source = settings, source
        self.name = source.path.resolve().name if Path(source.model).is_dir() else source.model
        self.stored_layout = None if source.merge is None else source.merge.layout
        self.layout = chosen(
            self.stored_layout, settings.merges, settings.merge_threshold, settings.chat_template
        )
        self.vocab_size = 0
        self.loaded: Future[None] = Future()

    def load_default(self) -> None:
        """Nothing: mlx-lm asks for it after :meth:`load_once`."""

    def load_once(self) -> None:
        """Loads the model in mlx-lm's generation thread; :attr:`loaded` says how that went."""
        try:
            self._load_pinned()
            self.loaded.set_result(None)
        except BaseException as error:
            self.loaded.set_exception(error)
            raise

    def load(self, *named: Any) -> tuple[nn.Module, Any]:
        """The model and its tokenizer, whatever name mlx-lm asks for."""
        return self.model, self.tokenizer

    def _load_pinned(self) -> None:
        settings = self.settings
        model, tokenizer, _ = load_source(self.source, max_blocks=settings.max_blocks)
        has_template = self.layout.chat_template and tokenizer.has_chat_template
        if settings.chat_template_args and not has_template:
            raise ServeError("`chat_template_args` needs a chat template, and none is applied")
        embedding = merged_embedding(model) or find_embedding(model, self.name)[1]
        self.vocab_size = embedding.weight.shape[0]
        if settings.top_k >= self.vocab_size:
            raise ServeError(
                f"`top_k` is {settings.top_k}, and the vocabulary has {self.vocab_size:,} tokens: "
                "give fewer"
            )
        caches = make_prompt_cache(model)
        self.is_batchable = all(hasattr(cache, "merge") for cache in caches)
        if settings.kv_bits is not None:
            _check_kv_bits(settings, model, caches)
        self.model, self.tokenizer = model, tokenizer
        self.model_key = (self.name, None, None)


def _check_kv_bits(settings: ServeSettings, model: nn.Module, caches: list[Any]) -> None:
    """Quantizes a KV cache at start-up, so that a request is not the first to fail."""
    model(mx.array([[0]]), cache=caches)
    try:
        maybe_quantize_kv_cache(caches, 0, settings.kv_group_size, settings.kv_bits)
    except (ValueError, NotImplementedError) as error:
        raise ServeError(of_mlx_lm(error)) from error


def _host_arguments(settings: ServeSettings) -> Namespace:
    """What mlx-lm's server reads of its command line."""
    size = settings.prompt_cache_bytes
    own = {"prompt_cache_bytes": parse_size(size) if isinstance(size, str) else size}
    own |= {"adapter_path": None, "draft_model": None, "pipeline": False}
    own |= {"chat_template": "", "use_default_chat_template": False}
    return Namespace(**vars(settings) | own)
