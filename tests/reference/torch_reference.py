"""K-Token Merging in PyTorch, Transformers and PEFT: the oracle of the parity tests.

The method and the tree task as published (DESIGN sections 1 and 9), written as plainly as they can
be so that they are right by reading, and the files of expected outputs. No MLX, no import from
`kmerge_mlx`, no speed: batch 1, float32 and no KV cache throughout.

Shapes: T prompt tokens, K merge factor, N = ceil(T / K) blocks, D hidden size, H inner size,
V vocabulary size, G generated tokens.

Source: the paper "K-Token Merging" (arXiv 2604.15153). Written from its description; the authors'
code has no licence and none of it is here. Only names of files and tensors are theirs, because
those are the format under test.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)  # sums are added in one order, and tiny models gain nothing from more

INNER_FACTORS = {2: 2.0, 3: 2.0, 4: 1.5}
INNER_FACTOR_PAST_4 = 1.5
GREEDY_TOKENS = 16


def default_inner_size(k: int, hidden_size: int) -> int:
    """The reference's H: int(factor * K) * D, that is 4D, 6D, 6D, 7D for K = 2, 3, 4, 5."""
    return int(INNER_FACTORS.get(k, INNER_FACTOR_PAST_4) * k) * hidden_size


class ReferenceEncoder(nn.Module):
    """Merges K embeddings into one: their mean plus what a three-layer MLP reads in them.

    PyTorch's default initialisation throughout, like the reference. The state dict's keys,
    `net.0.weight` to `net.4.bias`, are those of the authors' `encoder.pth`.
    """

    def __init__(self, k: int, hidden_size: int, inner_size: int | None = None):
        super().__init__()
        inner_size = inner_size or default_inner_size(k, hidden_size)
        self.k = k
        self.net = nn.Sequential(
            nn.Linear(k * hidden_size, inner_size),
            nn.ReLU(),
            nn.Linear(inner_size, k * hidden_size),
            nn.ReLU(),
            nn.Linear(k * hidden_size, hidden_size),
        )

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        """Merges each block: (N, K, D) embeddings to (N, D)."""
        return blocks.mean(dim=1) + self.net(blocks.flatten(start_dim=1))


def load_encoder(path: Path) -> ReferenceEncoder:
    """Reads an `encoder.pth`; the shapes in it decide K, D and H."""
    state = torch.load(path, weights_only=True)
    inner_size, flat_size = state["net.0.weight"].shape
    hidden_size = state["net.4.weight"].shape[0]
    encoder = ReferenceEncoder(flat_size // hidden_size, hidden_size, inner_size)
    encoder.load_state_dict(state)
    return encoder.eval()


def pad_token_id(tokenizer) -> int:
    """The id that fills up the last block: a space, else the pad, else the EOS token."""
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    candidates = [*space[:1], tokenizer.pad_token_id, tokenizer.eos_token_id]
    return next(candidate for candidate in candidates if candidate is not None)


def merge_prompt(
    embedding: nn.Module,
    encoder: ReferenceEncoder,
    ids: Sequence[int],
    k: int,
    pad_id: int,
) -> torch.Tensor:
    """Pads T prompt ids on the right with `pad_id`, and merges their embeddings by K: (N, D)."""
    padded = [*ids, *[pad_id] * (-len(ids) % k)]
    table_rows = embedding(torch.tensor(padded))  # (N * K, D)
    return encoder(table_rows.unflatten(0, (-1, k)))


def answer_loss(model: nn.Module, merged: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
    """The training loss of one example: the mean cross entropy of the answer after its prompt.

    `merged` is the (N, D) prompt, whose positions are read and never scored; `answer` ends with the
    EOS token, and all of it is scored.
    """
    answer = torch.tensor(answer)
    answer_rows = model.get_input_embeddings()(answer[:-1])  # the last token is only predicted
    positions = torch.cat([merged, answer_rows])
    logits = model(inputs_embeds=positions[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[len(merged) - 1 :], answer)


@torch.no_grad()
def decode(model: nn.Module, merged: torch.Tensor, count: int) -> tuple[list[int], torch.Tensor]:
    """Generates greedily after a merged (N, D) prompt; the EOS token does not stop it.

    Each new token is embedded by the base table and appended as it is. Every step reads all
    positions again: slower than a KV cache, and nothing to get wrong. Returns `count` token ids,
    and the (G, V) logits from which they were taken.
    """
    embedding = model.get_input_embeddings()
    positions = merged  # (N + tokens so far, D)
    tokens: list[int] = []
    steps: list[torch.Tensor] = []
    for _ in range(count):
        steps.append(model(inputs_embeds=positions[None], use_cache=False).logits[0, -1])
        tokens.append(int(steps[-1].argmax()))
        positions = torch.cat([positions, embedding(torch.tensor(tokens[-1:]))])
    return tokens, torch.stack(steps)


@dataclass
class Reference:
    """A trained checkpoint of the authors' layout, ready to answer."""

    model: PeftModel  # the base model under its adapter, in eval mode
    encoder: ReferenceEncoder
    tokenizer: object  # the base model's

    @property
    def k(self) -> int:
        """The checkpoint's merge factor."""
        return self.encoder.k

    def ids(self, prompt: str) -> list[int]:
        """The T token ids of a prompt."""
        return self.tokenizer(prompt)["input_ids"]

    @torch.no_grad()
    def merge(self, ids: Sequence[int]) -> torch.Tensor:
        """(N, D) merged embeddings of T prompt ids."""
        embedding = self.model.get_input_embeddings()
        return merge_prompt(embedding, self.encoder, ids, self.k, pad_token_id(self.tokenizer))


def load_base(folder: Path) -> nn.Module:
    """Loads a base model in float32 and eval mode, with the attention that is plain PyTorch."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def load_reference(base: Path, checkpoint: Path) -> Reference:
    """Loads a base model's folder and, on top of it, a checkpoint's adapter and encoder."""
    return Reference(
        model=PeftModel.from_pretrained(load_base(base), checkpoint).eval(),
        encoder=load_encoder(checkpoint / "encoder.pth"),
        tokenizer=AutoTokenizer.from_pretrained(base),
    )


def draw_example(rng: random.Random, nodes: int) -> tuple[str, str]:
    """Draws a textualized tree of two or more nodes and a question: its prompt and its answer."""
    names = rng.sample([a + b for a in ascii_uppercase for b in ascii_uppercase], nodes)
    path: list[str] = []  # from the root to the last node
    lines, edges = [], []
    for name in names:
        depth = rng.randint(1, len(path)) if path else 0  # below the last node, or one above it
        path[depth:] = [name]
        lines.append("+" * depth + name)
        edges += [(path[depth - 1], name)] if depth else []
    parent, child = rng.choice(edges) if rng.random() < 0.5 else rng.sample(names, 2)
    prompt = "Tree: " + "\n".join(lines) + ", Task: Parent/Child Relationship, "
    prompt += f"Parent: {parent}, Child: {child}, Answer: "
    return prompt, "true" if (parent, child) in edges else "false"


# Expected outputs


def write_expected(folder: Path, rng: random.Random) -> None:
    """Writes what a checkpoint on disk makes of six prompts.

    `expected.json` holds k, pad_token_id and cases: [{prompt, ids, greedy}]. For case i,
    `expected.safetensors` holds "{i}.merged" (N, D), "{i}.logits" (V,) of the first token, and
    "{i}.steps" (G, V) of all `greedy` tokens.
    """
    reference = load_reference(folder / "base", folder / "checkpoint")
    cases, tensors = [], {}
    for i, prompt in enumerate(_case_prompts(rng, reference)):
        ids = reference.ids(prompt)
        merged = reference.merge(ids)
        tokens, logits = decode(reference.model, merged, GREEDY_TOKENS)
        cases.append({"prompt": prompt, "ids": ids, "greedy": tokens})
        tensors |= {f"{i}.merged": merged, f"{i}.logits": logits[0].clone(), f"{i}.steps": logits}
    expected = {"k": reference.k, "pad_token_id": pad_token_id(reference.tokenizer), "cases": cases}
    text = json.dumps(expected, indent=1, ensure_ascii=False)
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")
    save_file(tensors, folder / "expected.safetensors")


def _case_prompts(rng: random.Random, reference: Reference) -> list[str]:
    """Whole blocks; one token short, and one over, of whole blocks; one token; bytes; long."""

    def tree_with_remainder(remainder: int) -> str:
        while True:
            prompt, _ = draw_example(rng, rng.randint(2, 10))
            if len(reference.ids(prompt)) % reference.k == remainder:
                return prompt

    return [
        tree_with_remainder(0),
        tree_with_remainder(reference.k - 1),
        tree_with_remainder(1),
        "A",
        "Tree: é → 漢字 🙂, Parent: ZZ",
        draw_example(rng, 80)[0],
    ]
