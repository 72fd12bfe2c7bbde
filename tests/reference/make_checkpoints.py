"""Makes the checkpoints of the parity tests: tiny base models, trained by PyTorch and PEFT.

`SPECS` are checkpoints in the authors' layout, with the answers PyTorch gives, and `ARCHITECTURES`
base models alone, with Transformers' logits. Everything is random, trained on the spot and decided
by a seed; `torch_reference` says what the right answers are. A checkpoint's folder:

    base/                  config, float32 weights, tokenizer (Transformers)
    checkpoint/            adapter_config.json, adapter_model.safetensors or .bin (PEFT),
                           encoder.pth, metrics.json
    expected.*             what PyTorch makes of it (`torch_reference.write_expected`)

T prompt tokens, K merge factor, D hidden size, V vocabulary size.
"""

from __future__ import annotations

import json
import random
import shutil
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
STEPS = 3  # of training: enough for a LoRA B that is not zero
VOCAB_SIZE = 700
HIDDEN_SIZE = 64
ROPE_THETA = 5000.0  # no architecture's default, so a loader that ignores it is caught

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


# Base models


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one kind: what it says beyond the shapes."""

    config_class: str  # in `transformers`
    tied: bool  # lm_head to the embedding, in the kind's small models
    layers: int = 3  # enough for every kind of layer to occur
    rope: Mapping = field(default_factory=lambda: _rope(ROPE_THETA))  # or one a kind of layer
    options: Mapping = field(default_factory=dict)  # further arguments of the config class


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


def make_base(folder: Path, architecture: str, seed: int = 0, tied: bool | None = None) -> None:
    """Writes a tiny random base model of `ARCHITECTURES` and a tokenizer into a folder.

    `tied` is whether lm_head is the embedding; None for what is usual for the architecture.
    """
    kind = ARCHITECTURES[architecture]
    config = getattr(transformers, kind.config_class)(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=160,
        num_hidden_layers=kind.layers,
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
    """Seeds PyTorch; the caller's state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# Checkpoints


# The paper's LoRA, for a small model.
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "lora_dropout": 0.05}
LORA |= {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head"]}


@dataclass(frozen=True)
class Spec:
    """What a checkpoint is to be."""

    k: int  # merge factor
    seed: int  # decides weights, prompts and training
    tied: bool = True  # the base's lm_head is its embedding
    # What differs from LORA, in PEFT's terms; patterns in alphabetical order, because PEFT saves
    # them in that order and the first one that fits wins.
    lora: Mapping[str, object] = field(default_factory=dict)
    architecture: str = "qwen2"
    bin_file: bool = False  # save adapter_model.bin (a pickle) instead of adapter_model.safetensors


PATTERNS = {
    "use_rslora": True,
    # A name's end, a longer one, two regular expressions, the head; q_proj fits two of them.
    "rank_pattern": {
        "layers.1.mlp.up_proj": 2,
        "layers.2.self_attn.q_proj": 3,
        "lm_head": 6,
        "q_proj": 8,
        r"self_attn\.[ko]_proj": 5,
    },
    "alpha_pattern": {
        r".*\.[01]\.mlp\.(gate|up)_proj": 8,
        "layers.1.self_attn.v_proj": 32,
        "lm_head": 12,
        "q_proj": 24,
    },
}
HEAD_PATTERN = {"use_rslora": True, "rank_pattern": {"lm_head": 8}, "alpha_pattern": {"lm_head": 4}}
TWO_LAYERS = {"target_modules": [*ATTENTION], "layers_to_transform": [0, 2]}
REGEX = {
    "target_modules": r"model\.layers\.[12]\.(self_attn\.[qk]_proj|mlp\.(gate|down)_proj)",
    "rank_pattern": {"down_proj": 2},
}
ALL_LINEAR, HEAD_ONLY = {"target_modules": "all-linear"}, {"target_modules": ["lm_head"], "r": 8}

SPECS: dict[str, Spec] = {
    "tied_k2_as_the_reference_trains": Spec(2, 1),
    "untied_k3_with_lm_head": Spec(3, 2, False),
    "tied_k4_rslora_with_rank_and_alpha_patterns": Spec(4, 3, True, PATTERNS),
    "untied_k4_attention_of_layers_0_and_2": Spec(4, 4, False, TWO_LAYERS),
    "tied_k5_target_regex": Spec(5, 5, True, REGEX),
    "untied_k2_all_linear_bin_file": Spec(2, 6, False, ALL_LINEAR, bin_file=True),
    "tied_k3_lm_head_only": Spec(3, 7, True, HEAD_ONLY),
    # PEFT adapts a module that is listed by its whole name ("lm_head") nevertheless.
    "tied_k4_layer_1_and_lm_head_bin_file": Spec(
        4, 8, True, {"layers_to_transform": [1]}, bin_file=True
    ),
    "untied_k5_llama_lm_head_pattern": Spec(5, 9, False, HEAD_PATTERN, "llama"),
    "tied_k2_qwen3": Spec(2, 10, architecture="qwen3"),
}


def make_checkpoint(folder: Path, spec: Spec) -> None:
    """Makes a base model, trains an encoder and LoRA on it, and writes what PyTorch answers."""
    base, checkpoint = folder / "base", folder / "checkpoint"
    make_base(base, spec.architecture, spec.seed, spec.tied)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with _reproducible(spec.seed):
        model = get_peft_model(load_base(base), LoraConfig(**LORA | spec.lora))
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
    for _ in range(STEPS):
        for _ in range(4):
            prompt, answer = draw_example(rng, rng.randint(2, 8))
            ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
            merged = merge_prompt(embedding, encoder, ids, spec.k, pad_id)
            loss = answer_loss(model, merged, [*answer_ids, tokenizer.eos_token_id])
            (loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
