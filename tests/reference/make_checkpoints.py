"""Makes the checkpoints of the parity tests: tiny base models, trained by PyTorch and PEFT.

Owns `SPECS` (checkpoints in the authors' layout, with the answers PyTorch gives) and
`ARCHITECTURES` (base models alone, with Transformers' logits). Everything is random, trained on the
spot and decided by a seed; `torch_reference` says what the right answers are.

    python -m tests.reference.make_checkpoints DIR [--spec NAME]

A checkpoint's folder:

    base/                  config, float32 weights, tokenizer (Transformers)
    checkpoint/            adapter_config.json, adapter_model.safetensors or .bin (PEFT),
                           encoder.pth, metrics.json
    expected.*             what PyTorch makes of it (`torch_reference.write_expected`)

T prompt tokens, K merge factor, D hidden size, V vocabulary size.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference.torch_reference import (
    ReferenceEncoder,
    answer_loss,
    draw_example,
    load_base,
    merge_prompt,
    pad_token_id,
    write_expected,
)

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "upstream_tied_k4" / "base"
VOCAB_SIZE = 700
HIDDEN_SIZE = 64
ROPE_THETA = 5000.0  # no architecture's default, so a loader that ignores it is caught

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
REFERENCE_TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head")


# Base models


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one kind: its Transformers config class and what it says beyond the shapes.

    Attributes:
        config_class: Name of the config class in `transformers`.
        tied: Whether the kind's small models tie lm_head to the embedding.
        layers: Enough for every kind of layer to occur.
        rope: `rope_parameters`; one dictionary, or one for each kind of layer.
        options: Further arguments of the config class.
    """

    config_class: str
    tied: bool
    layers: int = 3
    rope: Mapping = field(default_factory=lambda: _rope(ROPE_THETA))
    options: Mapping = field(default_factory=dict)


def _rope(theta: float, **scaling) -> dict:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


LLAMA3_ROPE = _rope(
    ROPE_THETA,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    # With heads 16 wide and this theta: frequencies of all three bands (kept, blended, divided).
    original_max_position_embeddings=256,
)
GEMMA3_ROPE = {"full_attention": _rope(ROPE_THETA), "sliding_attention": _rope(300.0)}

ARCHITECTURES: dict[str, Architecture] = {
    "qwen2": Architecture("Qwen2Config", tied=True),
    "qwen3": Architecture("Qwen3Config", tied=True, options={"head_dim": 32}),
    "llama": Architecture("LlamaConfig", tied=False),
    "llama3_rope": Architecture("LlamaConfig", tied=True, rope=LLAMA3_ROPE),
    "mistral": Architecture(
        "MistralConfig", tied=False, options={"head_dim": 32, "sliding_window": None}
    ),
    # Every sixth layer sees everything, the others a window of 8.
    "gemma3_text": Architecture(
        "Gemma3TextConfig",
        tied=True,
        layers=7,
        rope=GEMMA3_ROPE,
        options={"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8},
    ),
    # Every fourth layer has no position encoding.
    "smollm3": Architecture("SmolLM3Config", tied=True, layers=5),
}


def make_base(
    folder: Path,
    architecture: str,
    seed: int = 0,
    tied: bool | None = None,
    layers: int | None = None,
) -> None:
    """Writes a tiny random base model and a tokenizer into a folder.

    Args:
        folder: Made if need be; must not hold a model.
        architecture: A name in `ARCHITECTURES`.
        seed: Decides every weight.
        tied: Whether lm_head is the embedding; None for what is usual for the architecture.
        layers: None for what the architecture asks.

    Raises:
        FileExistsError: The folder holds a model.
    """
    kind = ARCHITECTURES[architecture]
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} already holds a model; choose an empty folder.")
    config = getattr(transformers, kind.config_class)(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=160,
        num_hidden_layers=layers or kind.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters=kind.rope,
        tie_word_embeddings=kind.tied if tied is None else tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **kind.options,
    )
    with _reproducible(seed):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)


def expected_logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """Transformers' logits of a base model for plain token ids: (T, V) float32."""
    with torch.no_grad(), _reproducible():
        return load_base(folder)(torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Draws weights that give parity tests something to see.

    Transformers starts norms at one, biases at zero and attention nearly uniform: a converter could
    mix those up and pass. Here every tensor has its own values and every layer changes the output.
    """
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.add_(0.2 * torch.randn_like(weight))
        else:
            weight.normal_(std=weight.shape[-1] ** -0.5)


@contextmanager
def _reproducible(seed: int = 0) -> Iterator[None]:
    """Seeds PyTorch and runs it on one thread; the caller's state is as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are then added in one order
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


# Checkpoints


@dataclass(frozen=True)
class Spec:
    """What a checkpoint is to be; the defaults are the paper's LoRA on a small Qwen2.

    Attributes:
        name: Its folder's name in `main`, and its name in a test report.
        k: Merge factor K.
        tied: Whether the base model's lm_head is its embedding.
        rslora: Scale alpha / sqrt(rank) instead of alpha / rank.
        rank_pattern: Ranks that differ: PEFT's patterns, each the end of a module's name or a
            regular expression for it. In alphabetical order, because PEFT saves them in that order
            and the first one that fits wins.
        alpha_pattern: The same for alphas.
        target_modules: The adapted modules: ends of names, a regular expression for whole names, or
            "all-linear" (all but the output layer). None for the reference's eight.
        layers_to_transform: Indices of the adapted layers; None for all. PEFT adapts a module that
            is listed by its whole name ("lm_head") nevertheless.
        layers: Number of layers of the base model.
        architecture: A name in `ARCHITECTURES`.
        rank: LoRA rank.
        alpha: LoRA alpha.
        bias: PEFT's "none", "all" or "lora_only".
        seed: Decides weights, prompts and training.
        steps: Training steps; a spec with little to train takes more to answer in the right form.
        bin_file: Save adapter_model.bin (a pickle) instead of adapter_model.safetensors.
        lora_options: Further arguments of PEFT's `LoraConfig` (use_dora, modules_to_save, ...).
    """

    name: str
    k: int
    tied: bool = True
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    target_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers: int = 3
    architecture: str = "qwen2"
    rank: int = 4
    alpha: float = 16
    bias: str = "none"
    seed: int = 0
    steps: int = 30
    bin_file: bool = False
    lora_options: Mapping[str, object] = field(default_factory=dict, hash=False)

    def lora_config(self) -> LoraConfig:
        """The adapter's configuration in PEFT's terms."""
        targets = REFERENCE_TARGETS if self.target_modules is None else self.target_modules
        layers = self.layers_to_transform
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.05,
            use_rslora=self.rslora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            target_modules=targets if isinstance(targets, str) else list(targets),
            layers_to_transform=None if layers is None else list(layers),
            bias=self.bias,
            **self.lora_options,
        )


SPECS: tuple[Spec, ...] = (
    Spec("tied_k2_as_the_reference_trains", k=2, seed=1),
    Spec("untied_k3_with_lm_head", k=3, tied=False, seed=2),
    Spec(
        "tied_k4_rslora_with_rank_and_alpha_patterns",
        k=4,
        rslora=True,
        # A name's end, a longer one, two regular expressions, the head; q_proj fits two of them.
        rank_pattern={
            "layers.1.mlp.up_proj": 2,
            "layers.2.self_attn.q_proj": 3,
            "lm_head": 6,
            "q_proj": 8,
            r"self_attn\.[ko]_proj": 5,
        },
        alpha_pattern={
            r".*\.[01]\.mlp\.(gate|up)_proj": 8,
            "layers.1.self_attn.v_proj": 32,
            "lm_head": 12,
            "q_proj": 24,
        },
        seed=3,
    ),
    Spec(
        "untied_k4_attention_of_layers_0_and_2",
        k=4,
        tied=False,
        target_modules=ATTENTION,
        layers_to_transform=(0, 2),
        seed=4,
    ),
    Spec(
        "tied_k5_target_regex",
        k=5,
        target_modules=r"model\.layers\.[12]\.(self_attn\.[qk]_proj|mlp\.(gate|down)_proj)",
        rank_pattern={"down_proj": 2},
        seed=5,
    ),
    Spec(
        "untied_k2_all_linear_bin_file",
        k=2,
        tied=False,
        target_modules="all-linear",
        bin_file=True,
        seed=6,
        steps=60,
    ),
    Spec("tied_k3_lm_head_only", k=3, target_modules=("lm_head",), rank=8, seed=7, steps=60),
    Spec(
        "tied_k4_layer_1_and_lm_head_bin_file",
        k=4,
        layers_to_transform=(1,),
        bin_file=True,
        seed=8,
        steps=60,
    ),
    Spec(
        "untied_k5_llama_lm_head_pattern",
        k=5,
        tied=False,
        architecture="llama",
        rslora=True,
        rank_pattern={"lm_head": 8},
        alpha_pattern={"lm_head": 4},
        seed=9,
    ),
    Spec("tied_k2_qwen3", k=2, architecture="qwen3", seed=10),
)


def make_checkpoint(folder: Path, spec: Spec) -> None:
    """Makes a base model, trains an encoder and LoRA on it, and writes all with expected outputs.

    Args:
        folder: Receives what this module's docstring lists; made if need be.
        spec: What to make.

    Raises:
        FileExistsError: The folder holds a base model.
    """
    base, checkpoint = folder / "base", folder / "checkpoint"
    make_base(base, spec.architecture, spec.seed, tied=spec.tied, layers=spec.layers)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with _reproducible(spec.seed):
        model = get_peft_model(load_base(base), spec.lora_config())
        encoder = ReferenceEncoder(spec.k, HIDDEN_SIZE)
        _train(model, encoder, tokenizer, spec)
    model.save_pretrained(checkpoint, safe_serialization=not spec.bin_file)
    torch.save(encoder.state_dict(), checkpoint / "encoder.pth")
    (checkpoint / "metrics.json").write_text(json.dumps({"merge_factor": spec.k}))
    with _reproducible():
        write_expected(folder, random.Random(spec.seed))


def _train(model: PeftModel, encoder: ReferenceEncoder, tokenizer, spec: Spec) -> None:
    """Trains LoRA and encoder together; four prompts a step, each merged by itself."""
    rng = random.Random(spec.seed)
    trained = [p for p in (*model.parameters(), *encoder.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    embedding, pad_id = model.get_input_embeddings(), pad_token_id(tokenizer)
    model.train()
    for _ in range(spec.steps):
        for _ in range(4):
            prompt, answer = draw_example(rng, 3, 8, (0, 3))
            ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
            merged = merge_prompt(embedding, encoder, ids, spec.k, pad_id)
            loss = answer_loss(model, merged, [*answer_ids, tokenizer.eos_token_id])
            (loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Writes every checkpoint, or the one named, to DIR/NAME."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference.make_checkpoints")
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--spec", metavar="NAME", choices=[spec.name for spec in SPECS])
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for spec in SPECS:
        if arguments.spec in (None, spec.name):
            start = time.perf_counter()
            make_checkpoint(arguments.folder / spec.name, spec)
            print(f"{spec.name}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
