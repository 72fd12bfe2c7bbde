"""Checkpoints in the authors' layout, written by hand: no torch, no PEFT, nothing under test.

``encoder.pth`` is put together byte by byte (``hostile_torch_parts``), the LoRA by the safetensors
library. The numbers are random and decided by a seed; a test compares with what it gets back here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.conftest import UPSTREAM
from tests.hostile_torch_parts import Record, number, pack, state, storage, tensor, text
from tests.tiny import build, qwen2_config

PREFIX = "base_model.model."
KINDS = {"float32": "torch.FloatStorage", "float16": "torch.HalfStorage"}
# PEFT 0.21's own config file of the fixture, to be changed option by option.
CONFIG = json.loads((UPSTREAM / "checkpoint" / "adapter_config.json").read_text())
# Path in a layer -> (in, out), of ``tests.tiny.qwen2_config``.
PROJECTIONS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "mlp.down_proj": (128, 64),
}


@dataclass
class Checkpoint:
    """What a checkpoint holds; change the parts, then write it."""

    encoder: dict[str, np.ndarray]  # net.0.weight and so on
    config: dict[str, Any]  # PEFT's adapter_config.json
    adapter: dict[str, np.ndarray]  # by PEFT's names
    metrics: Any = field(default_factory=lambda: {"merge_factor": 4})

    def write(self, folder: Path, bin_file: bool = False) -> Path:
        """Writes the files of the checkpoint into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "encoder.pth").write_bytes(torch_file(self.encoder))
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        (folder / "metrics.json").write_text(json.dumps(self.metrics))
        if bin_file:
            (folder / "adapter_model.bin").write_bytes(torch_file(self.adapter))
        else:
            save_file(self.adapter, folder / "adapter_model.safetensors")
        return folder


def make(
    k: int = 4,
    d: int = 64,
    h: int | None = None,
    layers: int = 2,
    rank: int = 4,
    vocab_size: int = 700,
    head: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    **options: Any,
) -> Checkpoint:
    """A good checkpoint that fits ``tests.tiny.qwen2_config``; ``options`` change PEFT's config.

    With a ``head`` lm_head is adapted as well, as the authors do; PEFT then saves a copy of it.
    """
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(dtype)

    h = h or 2 * k * d
    sizes = {"net.0": (h, k * d), "net.2": (k * d, h), "net.4": (d, k * d)}
    encoder = {f"{name}.weight": draw(*shape) for name, shape in sizes.items()}
    encoder |= {f"{name}.bias": draw(shape[0]) for name, shape in sizes.items()}
    targets = [name.rsplit(".", 1)[1] for name in PROJECTIONS]
    config = CONFIG | {"r": rank, "target_modules": [*targets, *(["lm_head"] if head else [])]}
    modules = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in PROJECTIONS.items()
    }
    adapter = {}
    for name, (inner, out) in (modules | ({"lm_head": (d, vocab_size)} if head else {})).items():
        adapter[f"{PREFIX}{name}.lora_A.weight"] = draw(rank, inner)
        adapter[f"{PREFIX}{name}.lora_B.weight"] = draw(out, rank)
    if head:
        copy = table() if (vocab_size, d) == table().shape else draw(vocab_size, d)
        adapter[f"{PREFIX}lm_head.base_layer.weight"] = copy.astype(dtype)
    return Checkpoint(encoder, config | options, adapter)


@cache
def table() -> np.ndarray:
    """The embedding and tied head of the base that ``write_base`` makes of ``qwen2_config()``."""
    return np.array(build(qwen2_config()).model.embed_tokens.weight)


def torch_file(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A state dict as ``torch.save`` writes it."""
    pairs, records = [], []
    for i, (name, array) in enumerate(arrays.items()):
        shape = array.shape
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        store = storage(KINDS[str(array.dtype)], text(str(i)), number(array.size))
        pairs += [text(name), tensor(0, shape, strides, store)]
        records.append(Record(f"archive/data/{i}", array.tobytes()))
    first = [Record("archive/data.pkl", state(*pairs)), Record("archive/version", b"3\n")]
    return pack([*first, *records])
