"""Converting a checkpoint of the paper's size: seconds and peak memory against its size on disk.

Makes what the authors' code leaves for Qwen2.5-0.5B at K = 4 (the encoder, LoRA of rank 4 on every
projection of 24 layers and on lm_head, all in float32, with PEFT's copy of lm_head's weight), with
random numbers and without torch. Converts it in fresh processes, and prints for each: seconds of
the conversion alone and of the whole process, and the process's peak memory.

    python benchmarks/convert.py --runs 3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.checkpoints import CONFIG, PREFIX, torch_file

K, D, H, RANK, LAYERS, VOCAB_SIZE, WIDE = 4, 896, 5376, 4, 24, 151_936, 4864
PROJECTIONS = {  # path in a layer -> (in, out)
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (D, 128),
    "self_attn.v_proj": (D, 128),
    "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (D, WIDE),
    "mlp.up_proj": (D, WIDE),
    "mlp.down_proj": (WIDE, D),
}
ENCODER = {"net.0": (H, K * D), "net.2": (K * D, H), "net.4": (D, K * D)}

CHILD = """
import json, sys, time
sys.path.insert(0, sys.argv[3])
from measure import peak
from kmerge_mlx.convert.checkpoint import convert_checkpoint

imported, start = peak(), time.perf_counter()
convert_checkpoint(sys.argv[1], sys.argv[2])
print(json.dumps([time.perf_counter() - start, imported, peak()]))
"""


def write_checkpoint(folder: Path) -> int:
    """Writes the checkpoint and returns its size in bytes."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    encoder = {f"{name}.weight": draw(*shape) for name, shape in ENCODER.items()}
    encoder |= {f"{name}.bias": draw(shape[0]) for name, shape in ENCODER.items()}
    (folder / "encoder.pth").write_bytes(torch_file(encoder))
    modules = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in PROJECTIONS.items()
    }
    adapter = {f"{PREFIX}lm_head.base_layer.weight": draw(VOCAB_SIZE, D)}
    for name, (inner, out) in (modules | {"lm_head": (D, VOCAB_SIZE)}).items():
        adapter[f"{PREFIX}{name}.lora_A.weight"] = draw(RANK, inner)
        adapter[f"{PREFIX}{name}.lora_B.weight"] = draw(out, RANK)
    save_file(adapter, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Prints one line a run, and the targets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "checkpoint"
        source.mkdir()
        size = write_checkpoint(source)
        print(f"checkpoint: {size / 1e6:.0f} MB on disk")
        for run in range(arguments.runs):
            destination = Path(scratch) / f"adapter{run}"
            start = time.perf_counter()
            here = str(Path(__file__).parent)
            command = [sys.executable, "-c", CHILD, str(source), str(destination), here]
            seconds, imported, peak = json.loads(subprocess.check_output(command))
            whole = time.perf_counter() - start
            written = sum(path.stat().st_size for path in destination.iterdir())
            print(
                f"run {run}: {seconds:.2f} s to convert ({whole:.2f} s with Python's imports), "
                f"peak {peak / 1e6:.0f} MB = {peak / size:.2f}x the checkpoint "
                f"({imported / 1e6:.0f} MB of it before), {written / 1e6:.0f} MB written"
            )
    print("targets: at most 5 s, and at most 3x the checkpoint")


if __name__ == "__main__":
    main()
