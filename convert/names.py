"""Reads the names that PyTorch and PEFT give to tensors and modules, whatever wraps them.

Source: PyTorch 2.13's ``DistributedDataParallel``, FSDP, ``checkpoint_wrapper`` and ``compile``;
PEFT 0.21's saved tensor names (``base_model.model.<module>.lora_A.weight``).
"""

from __future__ import annotations

import re

PREFIX = "base_model.model."
# What wrappers put into names, anywhere: distributed training, torch.compile, FSDP, checkpointing
# of activations; and PEFT itself, once more where a PEFT model was wrapped. In patterns, too.
WRAPPERS = (
    re.compile(
        r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\\?\."
    ),
    re.compile(r"(?:^|(?<=\.))base_model\\?\.model\\?\."),
)
# Where AutoModel's names begin, which lack the first part of AutoModelForCausalLM's.
HEADLESS = ("layers.", "embed_tokens.", "norm.")

# What a PEFT tensor name ends with -> mlx-lm's name for its transpose.
SUFFIXES = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}

# Tensors that repeat the base model. PEFT saves them when the head is a target.
COPIES = (".base_layer.weight", ".base_layer.bias")

# PEFT saves no adapter name; a raw state dict has its default one.
ADAPTER_NAME = re.compile(r"\.(lora_\w+|modules_to_save|token_adapter)\.default(?=\.|$)")


def unwrapped(name: str) -> str:
    """A tensor's or module's name, or a pattern for some, as it is without any wrapper."""
    for wrapper in WRAPPERS:
        name = wrapper.sub("", name)
    return name


def in_causal_lm(name: str) -> str:
    """A name as it is below AutoModelForCausalLM, also where AutoModel was trained."""
    return f"model.{name}" if name.startswith(HEADLESS) else name


def place(name: str) -> tuple[str, int | None, str]:
    """The stack of layers that a module is in, the layer's index, and the path inside the layer."""
    parts = name.split(".")
    for i, part in enumerate(parts[1:-1], 1):
        if part.isascii() and part.isdigit() and len(part) < 7 and part == str(int(part)):
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", None, name
