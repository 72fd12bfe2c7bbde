"""A model folder as mlx-lm writes it, which may carry the adapter it is to be read with.

Owns: the folder's content (config, tokenizer, weights, ``kmerge/``), where it may be written, and
that it appears whole or not at all. Does not know how its model came to be.

Source: ``mlx_lm.utils.save``. mlx-lm looks for weights at the root alone, so it runs the folder as
a plain model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, save

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters.folder import Adapter, carried_by, check_adapter_destination, write_adapter
from kmerge_mlx.adapters.schema import BaseModelConfig, MergeConfig
from kmerge_mlx.config import CARRIED
from kmerge_mlx.errors import ModelError, first_line
from kmerge_mlx.files import check_destination, flush, replacing_folder, write_error
from kmerge_mlx.model import load

CONFIG = "config.json"
OWN_PATTERNS = (*DEFAULT_ALLOW_PATTERNS, "README.md", CARRIED)
"""Files that a model folder may hold; more than these is never deleted."""


def check_model_destination(
    path: str | Path, force: bool, flag: str, sources: Sequence[str | Path | None]
) -> None:
    """Refuses to write a model over something else, before any work is done.

    Args:
        path: Where the model is to be written.
        force: Whether a model folder there may be replaced.
        flag: The option that names it, for the errors.
        sources: What the model is made from: folders (others are passed over) that must stay.

    Raises:
        ModelError: Something is there and ``force`` is off, or it is no model folder, holds more,
            or is one of the sources.
        AdapterError: The adapter that it carries holds more.
    """
    path = Path(path)
    try:
        here = path.resolve()
        for source in sources:
            if source is not None and Path(source).is_dir():
                folder = Path(source).resolve()
                if here == folder or here in folder.parents:
                    raise ModelError(f"{flag} {path} would replace {source}, which is read")
        names = []
        if path.is_dir():
            inside = [child.name for child in path.iterdir()]
            names = [n for n in inside if any(fnmatch(n, pattern) for pattern in OWN_PATTERNS)]
    except OSError as e:
        raise ModelError(f"cannot write {path}: {e.strerror}") from None
    check_destination(path, force, "model", names, ModelError, marker=CONFIG)
    if CARRIED in names:
        check_adapter_destination(path / CARRIED, force)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends without an error.

    Raises:
        ModelError: The disk is full, or the place is not writable. Nothing is left there then.
    """
    path = Path(path)
    try:
        with replacing_folder(path) as folder:
            yield folder
    except OSError as e:
        raise ModelError(f"cannot write {path}: {e.strerror or first_line(e)}") from e


def write_model(
    folder: Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: Mapping[str, Any],
    source: Path,
    adapter: Adapter | None,
) -> None:
    """Writes a model's files into a folder that its caller makes appear whole.

    Args:
        folder: Is there, and empty.
        model: Without an adapter; it is empty afterwards, so that its memory is free.
        tokenizer: Its tokenizer.
        config: Its config.
        source: The base's folder, whose own Python files and generation settings come along.
        adapter: The adapter that the folder is to carry, or None.

    Raises:
        OSError: They cannot be written.
    """
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    try:
        save(folder, source, model, tokenizer, deepcopy(dict(config)))
    except RuntimeError as e:
        raise write_error(e, folder, size) from e
    if adapter is not None:
        (folder / CARRIED).mkdir()
        write_adapter(adapter, folder / CARRIED)
    for file in folder.iterdir():
        if file.is_file():
            flush(file)


def reload(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """Loads what was just written, as anybody will: with the adapter that it carries.

    Raises:
        ModelError: It cannot be loaded.
        AdapterError: Its adapter cannot.
    """
    carried = carried_by(folder)
    return load(str(folder), carried, trust_remote_code=trust_remote_code)[0]


def carried_merge(
    merge: MergeConfig, config: Mapping[str, Any], pad_token_id: int, made: Mapping[str, Any]
) -> MergeConfig:
    """What an adapter says of itself once a model folder carries it.

    The base is the folder around it, wherever that is, so it has no id.

    Args:
        merge: What it said before.
        config: The new model's.
        pad_token_id: Token that fills the last block.
        made: From :func:`made_by`.
    """
    base_model = BaseModelConfig(None, base.fingerprint(config))
    provenance = {**made, "before": dict(merge.provenance)}
    return replace(merge, base=base_model, pad_token_id=pad_token_id, provenance=provenance)


def made_by(how: str, name: str, adapter_path: str | Path | None) -> dict[str, Any]:
    """The provenance of a model that is made here.

    Args:
        how: ``fused`` or ``quantized``.
        name: What its base was called.
        adapter_path: Its adapter, or None.
    """
    adapter = None if adapter_path is None else str(adapter_path)
    return {f"{how}_by": f"kmerge-mlx {__version__}", "base_model": name, "adapter": adapter}
