"""Training in PyTorch and PEFT: the loss and the gradients that ours must have.

Owns one batch's forward and backward pass, written as plainly as it can be: every row is run alone,
without padding, as embeddings laid end to end, with logits at every position. No MLX, no import
from `kmerge_mlx`, no optimizer. Float32, LoRA dropout off.

Shapes: as in `torch_reference`.

Source: arXiv 2604.15153 (the loss is on the answer's tokens and the EOS after each answer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel

from tests.reference.torch_reference import (
    Reference,
    answer_loss,
    load_base,
    load_reference,
    merge_prompt,
    pad_token_id,
)


@dataclass(frozen=True)
class Row:
    """One example as token ids.

    Attributes:
        merged: The part of the prompt that is merged, at least one token.
        answer: The answer and the EOS after it; all of them are scored.
        raw: The part of the prompt that follows, read token by token.
    """

    merged: list[int]
    answer: list[int]
    raw: list[int] = field(default_factory=list)


def load_trainable(base: Path, checkpoint: Path) -> Reference:
    """`load_reference` with gradients for the LoRA and the encoder alone; dropout stays off."""
    reference = load_reference(base, checkpoint)
    reference.model = PeftModel.from_pretrained(
        load_base(base), checkpoint, is_trainable=True
    ).eval()
    return reference


def loss_and_gradients(
    reference: Reference, rows: Sequence[Row]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch and its gradients by autograd.

    Args:
        reference: From `load_trainable`.
        rows: The batch.

    Returns:
        The cross entropy summed over the batch's answer tokens and divided by their number, and
        the gradient of every tensor that is trained: PEFT's parameter names, and the encoder's
        ("net.0.weight" and so on).
    """
    model, encoder = reference.model, reference.encoder
    embedding, pad_id = model.get_input_embeddings(), pad_token_id(reference.tokenizer)
    total = torch.zeros(())
    for row in rows:
        merged = merge_prompt(embedding, encoder, row.merged, reference.k, pad_id)
        raw = embedding(torch.tensor(row.raw, dtype=torch.long))
        # Their mean over the row's answer, turned back into a sum.
        total = total + answer_loss(model, torch.cat([merged, raw]), row.answer) * len(row.answer)
    loss = total / sum(len(row.answer) for row in rows)
    trained = {
        name: parameter
        for module in (model, encoder)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return loss.item(), dict(zip(trained, gradients, strict=True))
