"""One framework's process for `train_step.py`: loads a model, takes steps, times them.

Started by `train_step.py` as `python train_step_child.py OPTIONS`, one JSON object. PyTorch is
imported by its process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from measure import peak, resident

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TOKENIZER = ROOT / "tests" / "fixtures" / "upstream_tied_k4" / "base"
RANK, ALPHA, LEARNING_RATE = 4, 16, 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
PAD = 220

Ids = list[list[int]]
Step = Callable[[Ids, Ids], float]  # prompts, answers -> mean loss
Side = tuple[int, Callable[[], Step], dict]  # bytes of the weights, what makes a step, versions


def draw_batch(shape: argparse.Namespace, number: int) -> tuple[Ids, Ids]:
    """The ids of step `number`: the same for both frameworks. The last of an answer is its EOS."""
    rng = random.Random(number)

    def draw(length: int) -> Ids:
        return [
            [rng.randrange(shape.vocab_size) for _ in range(length)]
            for _ in range(shape.batch_size)
        ]

    return draw(shape.prompt_tokens), draw(shape.answer_tokens)


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


def torch_side(shape: argparse.Namespace) -> Side:
    """PyTorch, as the paper's code does it: logits everywhere, labels of -100 on the prompt."""
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

        def step(prompts: Ids, answers: Ids) -> float:
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


def mlx_side(shape: argparse.Namespace) -> Side:
    """Ours: logits at answer positions alone."""
    sys.modules["torch"] = None  # Transformers would import it, and count it as our memory
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from kmerge_mlx.data.layout import TokenizedExample
    from kmerge_mlx.model import load_source, merged_embedding
    from kmerge_mlx.prompts.lay_out import Segment
    from kmerge_mlx.source import Source
    from kmerge_mlx.train.rows import make_batch

    mx.set_default_device(mx.cpu)
    mx.set_cache_limit(0)  # as a training run does on the CPU
    source = Source.find(str(shape.folder / "base"), shape.folder / "adapter", shape.k)
    model, *_ = load_source(source, fold=False)
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"])
    merged_embedding(model).encoder.unfreeze()
    mx.eval(model.parameters())

    def make_step() -> Step:
        model.train(not shape.check)
        update = mlx_update(model)

        def step(prompts: Ids, answers: Ids) -> float:
            examples = [
                TokenizedExample([Segment(p)], a) for p, a in zip(prompts, answers, strict=True)
            ]
            return update(make_batch(examples, shape.k, PAD, shape.vocab_size))

        return step

    about = {"mlx": mx.__version__, "threads": shape.threads}
    return sum(a.nbytes for _, a in tree_flatten(model.parameters())), make_step, about


def mlx_update(model):
    """A batch to its mean loss, by way of one optimizer step."""
    import mlx.core as mx
    import mlx.optimizers as optim

    from kmerge_mlx.train.loss import answer_loss
    from kmerge_mlx.train.ranks import Ranks
    from kmerge_mlx.train.step import Stepper

    # As torch.optim.AdamW, whose other defaults are MLX's.
    optimizer = optim.AdamW(LEARNING_RATE, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    stepper = Stepper(model, optimizer, answer_loss, 0.0, Ranks())

    def update(batch) -> float:
        loss, tokens, _ = stepper.update(stepper.add(batch, None))
        mx.eval(model.parameters(), optimizer.state)
        return loss.item() / tokens.item()

    return update


SIDES = {"torch": torch_side, "mlx": mlx_side}


def serve(shape: argparse.Namespace) -> None:
    """A child: loads, then answers every number on stdin with that many timed steps."""
    weights, make_step, about = SIDES[shape.side](shape)
    forget_peak()
    loaded, step, number = resident(), make_step(), 0
    for line in iter(sys.stdin.readline, ""):
        losses, seconds, cpu = [], [], []
        for _ in range(int(line)):
            # The check repeats one batch: what an update did shows in the next loss.
            batch = draw_batch(shape, 0 if shape.check else number)
            start, cpu_start = time.perf_counter(), time.process_time()
            losses.append(step(*batch))
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
            number += 1
        reply = {"losses": losses, "seconds": seconds, "cpu": cpu, "weights": weights}
        reply |= {"loaded": loaded, "peak": peak(), "about": {**about, "blas": blas()}}
        if "mlx.core" in sys.modules:
            reply["mlx_peak"] = sys.modules["mlx.core"].get_peak_memory()
        print(json.dumps(reply), flush=True)


def forget_peak() -> None:
    """Starts the peak anew where the system can (Linux), and MLX's own everywhere."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].reset_peak_memory()


def blas() -> str:
    """What multiplies matrices here, as far as this process shows it."""
    if preloaded := os.environ.get("LD_PRELOAD"):
        return f"{Path(preloaded).resolve().name} (preloaded)"
    torch = sys.modules.get("torch")
    if torch is not None:
        return "MKL in libtorch" if torch.backends.mkl.is_available() else "libtorch's"
    if sys.platform == "darwin":
        return "Accelerate"
    mapped = set(re.findall(r"/([^/\n]*blas[^/\n]*)\n", Path("/proc/self/maps").read_text()))
    return ", ".join(sorted(name for name in mapped if "scipy" not in name))  # that is NumPy's


if __name__ == "__main__":
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    options.folder = Path(options.folder)
    make_folder(options) if options.side == "make" else serve(options)
