"""What LoRA costs while a model answers: folded, as it is loaded, and by mlx-lm's own layers.

    python benchmarks/random_base.py qwen05b
    python benchmarks/lora.py qwen05b [--rank 8] [--length 512] [--tokens 32] [-n 5]

The base alone, with mlx-lm's LoRALinear on every linear layer, and with the folded layers take
turns in one process; nothing merges. Times are the medians, and beside them the ratio to the base
alone in the same round. On the CPU backend they are those of the process, so that a busy machine
matters less.
"""

from __future__ import annotations

import argparse
from time import perf_counter, process_time

import mlx.core as mx
from mlx_lm.generate import generate_step

from kmerge_mlx import model
from kmerge_mlx.adapters.schema import LoRASpec, MergeConfig
from kmerge_mlx.generation.cost import Spread
from kmerge_mlx.source import Source


def load(base: str, rank: int) -> dict[str, object]:
    """Three models over the same weights, by name."""
    source = Source.find(base)
    plain, *_ = model.load_source(source)
    models = {"base alone": plain}
    for name in ("LoRALinear", "folded"):
        llm, *_ = model.load_source(source, lazy=True)
        llm.update(plain.parameters())
        tuning, head = model.fresh_lora(llm, LoRASpec(rank, 2.0), len(llm.layers))
        model.wire(llm, MergeConfig(None, head_lora=head), tuning, 0, base)
        llm.eval()
        if name == "folded":
            model.fold_lora(llm)
        mx.eval(llm.parameters())
        models[name] = llm
    return models


def seconds(llm: object, length: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first token of a random prompt, and for each of the next ones."""
    clock = process_time if mx.default_device() == mx.cpu else perf_counter
    prompt = mx.random.randint(1, 1000, (length,))
    mx.eval(prompt)
    times = [clock()]
    for _ in generate_step(prompt, llm, max_tokens=tokens + 1):
        times.append(clock())
    return times[1] - times[0], (times[-1] - times[1]) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="generated after the first")
    parser.add_argument("-n", "--rounds", type=int, default=5, help="rounds that count")
    given = parser.parse_args()
    models = load(given.base, given.rank)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    names = list(models)
    for number in range(-1, given.rounds):  # the first warms up
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            both = seconds(models[name], given.length, given.tokens)
            found[name] += [both] if number >= 0 else []
    for i, what in enumerate(("first token", "each next token")):
        alone = [run[i] for run in found["base alone"]]
        for name, runs in found.items():
            own = [run[i] for run in runs]
            ratio = Spread.of(a / b for a, b in zip(own, alone, strict=True))
            line = f"{what}, {name}: {1000 * Spread.of(own).median:.1f} ms, {ratio.median:.3f}"
            print(f"{line} ({ratio.min:.3f}-{ratio.max:.3f}) of the base alone")


if __name__ == "__main__":
    main()
