"""Copies an adapter in bfloat16, half the size, with the hub's base in its config.

python examples/smollm2/keep.py out/adapters/qa/k2 adapters/smollm2-qa-k2
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import mlx.core as mx

from kmerge_mlx.adapters.folder import check_adapter_destination, load_adapter, save_adapter
from kmerge_mlx.errors import KMergeError

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="an adapter")
    parser.add_argument("destination", help="the folder to write")
    given = parser.parse_args()
    check_adapter_destination(given.destination, force=False)
    adapter = load_adapter(given.source)
    parts = ("tuning_weights", "encoder_weights", "head_weights")
    small = {
        part: {name: array.astype(mx.bfloat16) for name, array in getattr(adapter, part).items()}
        for part in parts
    }
    merge = replace(adapter.merge, base=replace(adapter.merge.base, id=BASE))
    save_adapter(replace(adapter, merge=merge, **small), given.destination)


if __name__ == "__main__":
    try:
        main()
    except KMergeError as error:
        sys.exit(f"error: {error}")
