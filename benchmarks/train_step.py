"""One training step: this project against plain PyTorch doing what the paper's code does, on CPUs.

PyTorch: Transformers' Qwen2 under a PEFT LoRA (rank 4 on the seven projections and lm_head), the
prompts merged by a torch encoder, logits at every position and labels of -100 on the prompt, AdamW
over encoder and LoRA. Ours: `Stepper` with MLX's AdamW. Both start from the same random weights, in
float32, and read the same new batch in every step, from token ids to changed weights.

Each framework has a process of its own with the same number of threads; both stay resident and take
turns. Before anything is timed, a first pair of processes takes three steps without dropout, and
their losses must agree: the same forward pass, the same gradients, the same optimizer.

Memory, per process: the highest resident set while stepping ("peak"); the same minus the resident
set once model, adapter and libraries are loaded ("growth": activations, gradients, optimizer); and
the growth plus the bytes of the weights ("with weights": no interpreter, no libraries).

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0 \\
        python benchmarks/train_step.py --repeats 5 --steps 3

LD_PRELOAD is for MLX on Linux; PyTorch's process runs without it, on the BLAS it brings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TOKENIZER = ROOT / "tests" / "fixtures" / "upstream_tied_k4" / "base"
RANK, ALPHA, LEARNING_RATE = 4, 16, 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
PAD = 220
CHECK_STEPS, CHECK_TOLERANCE, FALL_TOLERANCE = 4, 1e-5, 1e-2  # relative
WARM_UP_STEPS, SETTLE = 2, 0.3  # seconds: a BLAS's threads spin for a while after their last call
BYTES = ("growth", "with_weights", "peak", "mlx_peak")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Prompts = list[list[int]]
Step = Callable[[Prompts, Prompts], float]  # prompts, answers -> mean loss


def draw_batch(shape: argparse.Namespace, number: int) -> tuple[Prompts, Prompts]:
    """The ids of step `number`: the same for both frameworks. The last of an answer is its EOS."""
    rng = random.Random(number)

    def draw(length: int) -> Prompts:
        return [
            [rng.randrange(shape.vocab_size) for _ in range(length)]
            for _ in range(shape.batch_size)
        ]

    return draw(shape.prompt_tokens), draw(shape.answer_tokens)


# The children


def make_folder(shape: argparse.Namespace) -> None:
    """Writes a random base, a checkpoint as the authors' code leaves it, and its conversion."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config

    from kmerge_mlx.convert.checkpoint import convert_checkpoint
    from tests.reference.torch_reference import ReferenceEncoder

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(shape.hidden_size // 64, 1),
        num_key_value_heads=max(shape.hidden_size // 128, 1),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    base, checkpoint = shape.folder / "base", shape.folder / "checkpoint"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, base / name)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=shape.dropout,
        target_modules=list(TARGETS),
        init_lora_weights=False,  # B is not zero, so that the check sees every gradient
    )
    get_peft_model(model, lora).save_pretrained(checkpoint)
    torch.save(
        ReferenceEncoder(shape.k, shape.hidden_size).state_dict(), checkpoint / "encoder.pth"
    )
    (checkpoint / "metrics.json").write_text(json.dumps({"merge_factor": shape.k}))
    convert_checkpoint(str(checkpoint), shape.folder / "adapter", str(base), shape.k)


def torch_side(shape: argparse.Namespace) -> tuple[int, Callable[[], Step], dict]:
    """PyTorch: bytes of the weights, what makes a step, and what it all is."""
    import peft
    import torch
    import transformers

    from tests.reference.training import load_trainable

    torch.set_num_threads(shape.threads)
    reference = load_trainable(shape.folder / "base", shape.folder / "checkpoint")
    model, encoder = reference.model.train(not shape.check), reference.encoder
    model.set_attn_implementation("sdpa")  # what Transformers chooses by itself
    embedding = model.get_input_embeddings()
    parameters = [*model.parameters(), *encoder.parameters()]
    for parameter in parameters:
        parameter.sum()  # reads what from_pretrained mapped but did not load

    def make_step() -> Step:
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], LEARNING_RATE)

        def step(prompts: Prompts, answers: Prompts) -> float:
            ids = torch.tensor([p + [PAD] * (-len(p) % shape.k) for p in prompts])
            merged = encoder(embedding(ids).reshape(-1, shape.k, shape.hidden_size))
            merged = merged.reshape(len(prompts), -1, shape.hidden_size)  # (B, N, D)
            answer = torch.tensor(answers)
            unscored = torch.full(merged.shape[:2], -100)
            loss = model(
                inputs_embeds=torch.cat([merged, embedding(answer)], dim=1),
                labels=torch.cat([unscored, answer], dim=1),
                use_cache=False,
            ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {**versions, "peft": peft.__version__, "threads": torch.get_num_threads()}
    return sum(p.nbytes for p in parameters), make_step, about


def mlx_side(shape: argparse.Namespace) -> tuple[int, Callable[[], Step], dict]:
    """Ours: bytes of the weights, what makes a step, and what it all is."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten

    from kmerge_mlx import load
    from kmerge_mlx.data.layout import TokenizedExample
    from kmerge_mlx.model import merged_embedding
    from kmerge_mlx.prompt import Segment
    from kmerge_mlx.train.rows import make_batch
    from kmerge_mlx.train.step import Stepper

    mx.set_default_device(mx.cpu)
    model, _ = load(str(shape.folder / "base"), shape.folder / "adapter", shape.k)
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"])
    merged_embedding(model).encoder.unfreeze()
    mx.eval(model.parameters())

    def make_step() -> Step:
        # As in torch.optim.AdamW, whose defaults are otherwise MLX's.
        optimizer = optim.AdamW(LEARNING_RATE, bias_correction=True)
        optimizer.init(model.trainable_parameters())
        model.train(not shape.check)
        stepper = Stepper(model, optimizer)

        def step(prompts: Prompts, answers: Prompts) -> float:
            examples = [
                TokenizedExample([Segment(p)], a) for p, a in zip(prompts, answers, strict=True)
            ]
            batch = make_batch(examples, shape.k, PAD, shape.vocab_size)
            loss, *_ = stepper.update(stepper.add(batch, None))
            mx.eval(model.parameters(), optimizer.state)
            return float(loss)

        return step

    about = {"mlx": mx.__version__, "threads": shape.threads}
    return sum(a.nbytes for _, a in tree_flatten(model.parameters())), make_step, about


SIDES = {"torch": torch_side, "mlx": mlx_side}


def serve(shape: argparse.Namespace) -> None:
    """A child: loads, then answers every number on stdin with that many timed steps."""
    weights, make_step, about = SIDES[shape.child](shape)
    forget_peak()
    loaded, step, number = resident(), make_step(), 0
    for line in iter(sys.stdin.readline, ""):
        losses, seconds = [], []
        for _ in range(int(line)):
            # The check repeats one batch: what an update did shows in the next loss.
            batch = draw_batch(shape, 0 if shape.check else number)
            start = time.perf_counter()
            losses.append(step(*batch))
            seconds.append(time.perf_counter() - start)
            number += 1
        reply = {"losses": losses, "seconds": seconds, "weights": weights, "loaded": loaded}
        reply |= {"peak": peak(), "about": {**about, "blas": blas()}}
        if "mlx.core" in sys.modules:
            reply["mlx_peak"] = sys.modules["mlx.core"].get_peak_memory()
        print(json.dumps(reply), flush=True)


def resident() -> int:
    """This process's resident set, in bytes."""
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024


def peak() -> int:
    """The highest resident set since `forget_peak`, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's, before exec
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def forget_peak() -> None:
    """Starts the peak anew where the system can (Linux), and MLX's own everywhere."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].reset_peak_memory()


def blas() -> str:
    """The libraries that may multiply matrices here, by what is mapped into this process."""
    if sys.platform == "darwin":
        return "Accelerate" if "mlx.core" in sys.modules else "PyTorch's own"
    mapped = Path("/proc/self/maps").read_text()
    names = set(re.findall(r"/([^/\n]*(?:blas|mkl)[^/\n]*)\n", mapped))
    torch = sys.modules.get("torch")
    if torch is not None and torch.backends.mkl.is_available():
        names.add("MKL inside libtorch")
    return ", ".join(sorted(names)) or "none found"


# The parent


class Child:
    """A framework's process."""

    def __init__(self, shape: argparse.Namespace, name: str, folder: Path, check: bool = False):
        environment = child_environment(shape.threads, keep_preload=name == "mlx")
        arguments = ["--child", name, "--folder", str(folder), *(["--check"] if check else [])]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def steps(self, count: int) -> dict:
        """Takes steps and returns what `serve` reports."""
        print(count, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a child failed with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        if code := self.process.wait():
            raise SystemExit(f"a child failed with exit code {code}")


def child_environment(threads: int, keep_preload: bool) -> dict[str, str]:
    environment = dict(os.environ) | dict.fromkeys(THREAD_VARIABLES, str(threads))
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not keep_preload:
        environment.pop("LD_PRELOAD", None)
    return environment


def check(shape: argparse.Namespace, folder: Path) -> dict:
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


def measure(shape: argparse.Namespace, folder: Path) -> dict:
    """Both processes take turns; who is first alternates."""
    children = {name: Child(shape, name, folder) for name in SIDES}
    rounds: dict[str, list[float]] = {name: [] for name in SIDES}
    first: dict[str, float] = {}
    last: dict[str, dict] = {}
    for number in range(-1, shape.repeats):  # the first round is the warm-up
        for name in sorted(SIDES, reverse=number % 2 == 1):
            last[name] = children[name].steps(WARM_UP_STEPS if number < 0 else shape.steps)
            if number < 0:
                first[name] = last[name]["seconds"][0]
            else:
                rounds[name].append(statistics.median(last[name]["seconds"]))
            time.sleep(SETTLE)
    for child in children.values():
        child.close()
    ratios = [t / m for t, m in zip(rounds["torch"], rounds["mlx"], strict=True)]
    result = {"speedup": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}
    for name in SIDES:
        median = statistics.median(rounds[name])
        result[name] = {"step_seconds": median, "rounds": rounds[name], "first": first[name]}
        result[name] |= memory(last[name]) | {"about": last[name]["about"]}
    result["memory_ratio"] = {
        part: result["mlx"][part] / result["torch"][part]
        for part in ("growth", "with_weights", "peak")
    }
    return result


def memory(reply: dict) -> dict:
    """Bytes, as this module's docstring defines them."""
    growth = reply["peak"] - reply["loaded"]
    found = {"peak": reply["peak"], "growth": growth, "weights": reply["weights"]}
    found["with_weights"] = growth + reply["weights"]
    return found | {key: reply[key] for key in ("mlx_peak",) if key in reply}


def show(result: dict) -> None:
    """Prints the figures for people."""
    losses = result["check"]["losses"]
    for name in SIDES:
        print(f"check, no dropout: {name} losses " + ", ".join(f"{x:.6f}" for x in losses[name]))
    for name in SIDES:
        side = result[name]
        mb = {key: f"{value / 1e6:,.0f} MB" for key, value in side.items() if key in BYTES}
        print(
            f"{name}: {side['step_seconds'] * 1e3:,.0f} ms a step (the first {side['first']:.1f} s)"
            f", growth {mb['growth']}, with weights {mb['with_weights']}, peak {mb['peak']}"
            + (f", MLX's own peak with weights {mb['mlx_peak']}" if "mlx_peak" in mb else "")
        )
        print("  " + ", ".join(f"{key} {value}" for key, value in side["about"].items()))
    low, high = result["spread"]
    ratios = ", ".join(f"{key} {value:.3f}" for key, value in result["memory_ratio"].items())
    print(f"steps per second: {result['speedup']:.2f}x ({low:.2f}-{high:.2f})")
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
    parser.add_argument("--child", choices=("make", *SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    shape = parse()
    if shape.child:
        return make_folder(shape) if shape.child == "make" else serve(shape)
    options = {name: value for name, value in vars(shape).items() if isinstance(value, int)}
    result: dict = {"machine": machine(), "options": options | {"dropout": shape.dropout}}
    if not shape.json:
        print(f"{result['machine']}; {result['options']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        Child(shape, "make", Path(folder)).close()
        result["check"] = check(shape, Path(folder))
        result |= measure(shape, Path(folder))
    print(json.dumps(result)) if shape.json else show(result)
    return None


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
