"""Puts a trained base model and its adapters where the package keeps them, in half precision.

    python examples/bundled/pack.py base BASE
    python examples/bundled/pack.py adapter RUN [RUN ...]

Owns what goes into ``kmerge_mlx/bundled/``: the base's weights, config and tokenizer, and each
run's last adapter as ``k1``, ``k2`` and so on: by then the learning rate has ended, and no
validation set of a run tells it from the best. Weights are stored as float16, which halves the
wheel, and computed in float32 (see ``model.load``). Does not train.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from kmerge_mlx import bundled
from kmerge_mlx.adapters.folder import Adapter, load_adapter, save_adapter
from kmerge_mlx.files import replacing_folder, write_json, write_safetensors

LARGEST = 8 * 10**6  # bytes


def halved(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Weights as float16."""
    return {name: array.astype(mx.float16) for name, array in weights.items()}


def pack_base(folder: Path) -> None:
    """Packs what :mod:`train_base` wrote."""
    with replacing_folder(bundled.BASE) as new:
        write_json(new / "config.json", json.loads((folder / "config.json").read_text()))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (new / name).write_bytes((folder / name).read_bytes())
        write_safetensors(
            new / "model.safetensors", halved(mx.load(str(folder / "model.safetensors")))
        )


def pack_adapter(run: Path) -> None:
    """Packs a run's last adapter, by its K."""
    found = load_adapter(run)
    adapter = Adapter(
        replace(found.merge, base=replace(found.merge.base, id=bundled.BUNDLED)),
        found.tuning,
        halved(found.tuning_weights),
        halved(found.encoder_weights),
        halved(found.head_weights),
    )
    save_adapter(adapter, bundled.ADAPTERS / f"k{adapter.merge.merge_factor}")


def main() -> None:
    """Packs, and says how much there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("base", "adapter"))
    parser.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    for folder in options.folders:
        pack_base(folder) if options.what == "base" else pack_adapter(folder)
    root = bundled.BASE.parent
    size = sum(file.stat().st_size for file in root.rglob("*") if file.suffix != ".pyc")
    print(f"{size / 1e6:.2f} MB in {root}")
    if size > LARGEST:
        parser.error(f"expected at most {LARGEST / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
