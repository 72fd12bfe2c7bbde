"""Copies an adapter in bfloat16, half the size, with the hub's base in its config.

python examples/smollm2/keep.py out/adapters/qa/k2 adapters/smollm2-qa-k2
"""

from __future__ import annotations

import sys
from dataclasses import replace

import mlx.core as mx

from kmerge_mlx.adapters.folder import load_adapter, save_adapter

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    source, destination = sys.argv[1:]
    adapter = load_adapter(source)
    parts = ("tuning_weights", "encoder_weights", "head_weights")
    small = {
        part: {name: array.astype(mx.bfloat16) for name, array in getattr(adapter, part).items()}
        for part in parts
    }
    merge = replace(adapter.merge, base=replace(adapter.merge.base, id=BASE))
    save_adapter(replace(adapter, merge=merge, **small), destination)


if __name__ == "__main__":
    main()
