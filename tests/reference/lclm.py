"""LCLM in PyTorch, from its description alone: tiny random checkpoints, and what they answer.

Source: arXiv 2606.09659 and docs/lclm.md. The authors' own answers are in
``tests/fixtures/lclm_cs4_w16``; ``tests/test_window_encoder.py`` compares both with ours.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

AUTHORS = Path(__file__).parents[1] / "fixtures" / "lclm_cs4_w16"
MARKED = re.compile(r"<\|memory_start\|>(.*?)<\|memory_end\|>", re.DOTALL)
GREEDY = 16


@dataclass(frozen=True)
class Sizes:
    """A checkpoint: N tokens a position, windows of W after O tokens of overlap."""

    ratio: int
    window: int
    overlap: int = 0
    pooling: str = "mean"
    width: int = 64  # of the decoder
    encoder_width: int = 48
    lora: bool = False  # the decoder is a LoRA, and its base lies in ``base``


@dataclass(frozen=True)
class Expected:
    """What the checkpoint makes of a prompt."""

    memory_ids: list[list[int]]
    latents: torch.Tensor  # (positions, D)
    logits: torch.Tensor  # (V), of the first token
    greedy: list[int]


def make(folder: Path, sizes: Sizes, seed: int = 0) -> Path:
    """Writes a random checkpoint in float32."""
    torch.manual_seed(seed)
    shared = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    shared |= {"num_hidden_layers": 2, "tie_word_embeddings": True, "rope_theta": 1e6}
    parts = {"decoder": (Qwen3ForCausalLM, sizes.width, 703)}
    parts |= {"encoder": (Qwen3Model, sizes.encoder_width, 700)}
    for name, (kind, width, rows) in parts.items():
        config = Qwen3Config(
            hidden_size=width, intermediate_size=2 * width, vocab_size=rows, **shared
        )
        model = kind(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
        if sizes.lora and name == "decoder":
            model.save_pretrained(folder / "base")
            for file in (AUTHORS / "checkpoint" / "encoder").glob("tokenizer*"):
                shutil.copy(file, folder / "base")  # a base does not have the markers
            targets = ["q_proj", "down_proj", "lm_head"]
            model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets))
            for tensor_name, parameter in model.named_parameters():
                if "lora_" in tensor_name:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
        for file in (AUTHORS / "checkpoint" / name).glob("tokenizer*"):
            shutil.copy(file, folder / name)
    wide = sizes.encoder_width * (sizes.ratio if sizes.pooling == "concat" else 1)
    shapes = {"norm.weight": (wide,), "fc1.weight": (80, wide), "fc1.bias": (80,)}
    shapes |= {"fc2.weight": (sizes.width, 80), "fc2.bias": (sizes.width,)}
    (folder / "adapter").mkdir()
    tensors = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter" / "adapter.safetensors")
    about = {"compression_ratio": sizes.ratio, "encoder_window_size": sizes.window}
    about |= {"boundary_overlap": sizes.overlap, "pooling": sizes.pooling}
    about |= {"encoder_mask_type": "causal", "adapter_type": "mlp"}
    (folder / "model_config.json").write_text(json.dumps(about))
    return folder


class Reference:
    """A checkpoint, ready to answer."""

    def __init__(self, folder: Path):
        self.sizes = json.loads((folder / "model_config.json").read_text())
        # Transformers loads a LoRA by PEFT, on the base that it names.
        self.decoder = AutoModelForCausalLM.from_pretrained(folder / "decoder").eval()
        self.encoder = AutoModel.from_pretrained(folder / "encoder").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "decoder")
        self.encoders = AutoTokenizer.from_pretrained(folder / "encoder")
        self.projection = load_file(folder / "adapter" / "adapter.safetensors")

    @torch.no_grad()
    def latents(self, ids: list[int]) -> torch.Tensor:
        """What stands for some tokens: ``(ceil(T / N), D)``."""
        n, w, o = (
            self.sizes[name]
            for name in ("compression_ratio", "encoder_window_size", "boundary_overlap")
        )
        pooled = []
        for start in range(0, len(ids), w):
            before = min(start, o)
            window = torch.tensor([ids[start - before : start + w]])
            states = self.encoder(window).last_hidden_state[0, before:]
            for group in states.split(n):
                if self.sizes["pooling"] == "mean":
                    pooled.append(group.mean(0))
                else:
                    short = n - len(group)
                    pooled.append(functional.pad(group.flatten(), (0, short * group.shape[1])))
        p, x = self.projection, torch.stack(pooled)
        x = functional.rms_norm(x, x.shape[-1:], p["norm.weight"], eps=1e-6)
        x = functional.gelu(functional.linear(x, p["fc1.weight"], p["fc1.bias"]))
        return functional.linear(x, p["fc2.weight"], p["fc2.bias"])

    @torch.no_grad()
    def answer(self, prompt: str) -> Expected:
        """What is expected of a prompt with the two markers in its text."""
        memory = [
            self.encoders(text, add_special_tokens=False)["input_ids"]
            for text in MARKED.findall(prompt)
        ]
        latents = [self.latents(ids) for ids in memory]
        counts = iter(map(len, latents))
        text = MARKED.sub(
            lambda _: f"<|memory_start|>{'<|memory|>' * next(counts)}<|memory_end|>", prompt
        )
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        table = self.decoder.get_input_embeddings()
        read = table(ids)
        flat = torch.cat(latents) if latents else torch.zeros(0, read.shape[-1])
        read[ids == self.tokenizer.convert_tokens_to_ids("<|memory|>")] = flat
        greedy, first = [], None
        for _ in range(GREEDY):
            logits = self.decoder(inputs_embeds=read).logits[0, -1]
            first = logits if first is None else first
            greedy.append(int(logits.argmax()))
            read = torch.cat([read, table(torch.tensor([greedy[-1:]]))], 1)
        return Expected(memory, flat, first, greedy)
