"""Copies an adapter in bfloat16: half the size, for a repository or a download.

python examples/smollm2/keep.py out/adapters/qa/k2 adapters/smollm2-qa-k2
"""

from __future__ import annotations

import sys
from dataclasses import replace

import mlx.core as mx

from kmerge_mlx.adapters.folder import load_adapter, save_adapter


def main() -> None:
    source, destination = sys.argv[1:]
    adapter = load_adapter(source)
    parts = ("tuning_weights", "encoder_weights", "head_weights")
    small = {
        part: {name: array.astype(mx.bfloat16) for name, array in getattr(adapter, part).items()}
        for part in parts
    }
    save_adapter(replace(adapter, **small), destination)


if __name__ == "__main__":
    main()
