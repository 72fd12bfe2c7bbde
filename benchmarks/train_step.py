"""One training step: this project against plain PyTorch doing what the paper's code does, on CPUs.

PyTorch: Transformers' Qwen2 under a PEFT LoRA (rank 4 on the seven projections and lm_head), the
prompts merged by a torch encoder, logits at every position and labels of -100 on the prompt, AdamW
over encoder and LoRA. Ours: `Stepper` with MLX's AdamW. Both start from the same random weights, in
float32, and read the same new batch in every step, from token ids to changed weights.

Each framework has a process of its own with the same number of threads; both stay resident and take
turns. Before anything is timed, a first pair of processes takes four steps on one batch without
dropout, and their losses must agree: the same forward pass, gradients and optimizer.

Memory, per process: the highest resident set while stepping ("peak"); the same minus the resident
set once model, adapter and libraries are loaded ("growth": activations, gradients, optimizer); and
the growth plus the bytes of the weights ("with weights": no interpreter, no libraries). "mlx_peak"
is MLX's own count, weights included; it counts what is allocated and not yet touched. Where others
compute on the same cores, processor time with --threads 1 tells more than a clock.

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0 \\
        python benchmarks/train_step.py --repeats 5 --steps 3

LD_PRELOAD is for MLX on Linux; PyTorch's process runs without it, on the BLAS it brings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = Path(__file__).with_name("train_step_child.py")
SIDES = ("torch", "mlx")
CHECK_STEPS, CHECK_TOLERANCE, FALL_TOLERANCE = 4, 1e-5, 1e-2  # relative
WARM_UP_STEPS, SETTLE = 2, 0.3  # seconds: a BLAS's threads spin for a while after their last call
COMPARED = ("growth", "with_weights", "peak")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Child:
    """A framework's process.

    Args:
        shape: The options.
        side: "torch", "mlx", or "make" for the one that makes the model.
        folder: Where the model is.
        check: Leave dropout out and repeat one batch.
    """

    def __init__(self, shape: argparse.Namespace, side: str, folder: str, check: bool = False):
        options = {**vars(shape), "side": side, "folder": folder, "check": check}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", CHILD, json.dumps(options)],
            env=child_environment(shape.threads, keep_preload=side == "mlx"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def steps(self, count: int) -> dict:
        """Takes steps and returns what the child's `serve` reports."""
        print(count, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline() or self._failed())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        if self.process.wait():
            self._failed()

    def _failed(self):
        raise SystemExit(f"a child failed with exit code {self.process.wait()}")


def child_environment(threads: int, keep_preload: bool) -> dict[str, str]:
    environment = dict(os.environ) | dict.fromkeys(THREAD_VARIABLES, str(threads))
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not keep_preload:
        environment.pop("LD_PRELOAD", None)
    return environment


def check(shape: argparse.Namespace, folder: str) -> dict:
    """Losses of the first steps on one batch, without dropout, in both frameworks."""
    losses = {}
    for name in SIDES:
        child = Child(shape, name, folder, check=True)
        losses[name] = child.steps(CHECK_STEPS)["losses"]
        child.close()
    gap = max(abs(a / b - 1) for a, b in zip(losses["mlx"], losses["torch"], strict=True))
    falls = {name: values[0] - values[-1] for name, values in losses.items()}
    if gap > CHECK_TOLERANCE or abs(falls["mlx"] / falls["torch"] - 1) > FALL_TOLERANCE:
        raise SystemExit(f"the two do not compute the same: {losses}")
    return {"losses": losses, "largest_relative_gap": gap}


def measure(shape: argparse.Namespace, folder: str) -> dict:
    """Both processes take turns; who is first alternates."""
    children = {name: Child(shape, name, folder) for name in SIDES}
    rounds: dict[str, list[dict]] = {name: [] for name in SIDES}
    for number in range(shape.repeats + 1):  # the first round is the warm-up
        for name in sorted(SIDES, reverse=number % 2 == 1):
            rounds[name].append(children[name].steps(shape.steps if number else WARM_UP_STEPS))
            time.sleep(SETTLE)
    for child in children.values():
        child.close()
    result: dict = {}
    for name, (first, *timed) in rounds.items():
        seconds, cpu = (
            [statistics.median(one[key]) for one in timed] for key in ("seconds", "cpu")
        )
        result[name] = {"step_seconds": statistics.median(seconds), "rounds": seconds}
        result[name] |= {"cpu_seconds": statistics.median(cpu), "first": first["seconds"][0]}
        result[name] |= memory(timed[-1]) | {"about": timed[-1]["about"]}
    theirs, ours = result["torch"], result["mlx"]
    ratios = [t / m for t, m in zip(theirs["rounds"], ours["rounds"], strict=True)]
    result["speedup"] = statistics.median(ratios)
    result["spread"] = [min(ratios), max(ratios)]
    result["cpu_ratio"] = theirs["cpu_seconds"] / ours["cpu_seconds"]
    result["memory_ratio"] = {part: ours[part] / theirs[part] for part in COMPARED}
    return result


def memory(reply: dict) -> dict:
    """Bytes, as this module's docstring defines them."""
    growth = reply["peak"] - reply["loaded"]
    found = {"peak": reply["peak"], "growth": growth, "weights": reply["weights"]}
    found["with_weights"] = growth + reply["weights"]
    return found | {key: reply[key] for key in ("mlx_peak",) if key in reply}


def show(result: dict) -> None:
    """Prints the figures for people."""
    for name in SIDES:
        losses = ", ".join(f"{loss:.6f}" for loss in result["check"]["losses"][name])
        print(f"check, no dropout, {name}: losses {losses}")
    for name in SIDES:
        side = result[name]
        print(
            f"{name}: {side['step_seconds']:.3f} s a step, of processor time "
            f"{side['cpu_seconds']:.3f} s, the first {side['first']:.1f} s"
        )
        mb = [
            f"{part} {side[part] / 1e6:,.0f} MB" for part in (*COMPARED, "mlx_peak") if part in side
        ]
        print("  memory: " + ", ".join(mb))
        print("  " + ", ".join(f"{key} {value}" for key, value in side["about"].items()))
    low, high = result["spread"]
    ratios = ", ".join(f"{part} {value:.3f}" for part, value in result["memory_ratio"].items())
    print(f"steps per second, ours over PyTorch's: {result['speedup']:.2f} ({low:.2f}-{high:.2f})")
    print(f"steps per second of processor time: {result['cpu_ratio']:.2f}")
    print(f"memory, ours over PyTorch's: {ratios}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=16, help="the EOS included")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--dropout", type=float, default=0.05, help="of the LoRA, on both sides")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps of each in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    shape = parse()
    result: dict = {"machine": machine(), "options": vars(shape)}
    if not shape.json:
        options = ", ".join(f"{name} {value}" for name, value in vars(shape).items())
        print(f"{result['machine']}\n{options}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        Child(shape, "make", folder).close()
        result["check"] = check(shape, folder)
        result |= measure(shape, folder)
    print(json.dumps(result)) if shape.json else show(result)


def machine() -> str:
    """Processor, cores and system, in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found[1]
    return (
        f"{name}, {os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
