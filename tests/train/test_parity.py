"""Training's loss and gradients against PyTorch + PEFT autograd.

Models: the authors' own checkpoint (K = 4, tied) and checkpoints made live (K = 2, 3 and 4, tied
and untied), whose LoRA B is not zero, so that no gradient is. float32 on both sides: what remains
is the order of summation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from kmerge_mlx.data.layout import TokenizedExample
from kmerge_mlx.model import load_source, merged_embedding
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.source import Source
from kmerge_mlx.train.loss import answer_loss
from kmerge_mlx.train.rows import Batch, make_batch
from tests.reference.torch_reference import draw_example
from tests.reference.training import Row, load_trainable, loss_and_gradients

pytestmark = pytest.mark.slow

LIVE = (
    *("tied_k2_as_the_reference_trains", "untied_k3_with_lm_head"),
    "tied_k4_rslora_with_rank_and_alpha_patterns",
    "untied_k4_attention_of_layers_0_and_2",
)
ANSWERS = ("true", "false", "KQ", "+AB\n++CD\n++EF", "the parent is QZ, not ZQ")
ENCODER = {
    f"net.{2 * i}.{part}": f"w{i + 1}.{part}" for i in range(3) for part in ("weight", "bias")
}


@dataclass
class Case:
    """A checkpoint in both frameworks, and one batch of it."""

    folder: Path  # holds base/ and checkpoint/
    model: nn.Module  # ours; the encoder and the LoRA are trainable, dropout is off
    rows: list[Row]  # the batch, as the oracle reads it
    batch: Batch  # the same, as ours does

    def loss_and_gradients(self) -> tuple[float, dict[str, mx.array]]:
        def mean_loss(model: nn.Module) -> mx.array:
            total, tokens = answer_loss(model, self.batch)
            return total / tokens

        loss, gradients = nn.value_and_grad(self.model, mean_loss)(self.model)
        return loss.item(), dict(tree_flatten(gradients))


def make_case(folder: Path, adapter: Path) -> Case:
    convert_checkpoint(str(folder / "checkpoint"), adapter, str(folder / "base"))
    source = Source.find(str(folder / "base"), adapter)
    model, tokenizer, _ = load_source(source, fold=False)
    merged = merged_embedding(model)
    k = merged.merge_factor
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"])
    merged.encoder.unfreeze()
    rows = batch_rows(tokenizer, k)
    examples = [
        TokenizedExample(
            [Segment(row.merged), *([Segment(row.raw, merge=False)] if row.raw else [])], row.answer
        )
        for row in rows
    ]
    batch = make_batch(examples, k, merged.pad_token_id, merged.vocab_size)
    return Case(folder, model, rows, batch)


def batch_rows(tokenizer, k: int) -> list[Row]:
    """Seven rows: five trees of unequal length, less than a block, a question that stays raw."""
    rng = random.Random(k)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    rows = [
        Row(ids(draw_example(rng, nodes)[0]), [*ids(answer), tokenizer.eos_token_id])
        for nodes, answer in zip((2, 3, 6, 10, 18), ANSWERS, strict=True)
    ]
    tree, _, question = draw_example(rng, 8)[0].partition(", Task")
    rows.append(Row(ids("A")[:1], [*ids("B"), tokenizer.eos_token_id]))
    rows.append(Row(ids(tree), [*ids("true"), tokenizer.eos_token_id], ids(question)))
    assert len({len(row.merged) for row in rows}) >= 5
    assert len({len(row.answer) for row in rows}) >= 4
    return rows


@pytest.fixture(scope="module", params=["upstream", *LIVE])
def case(request, tmp_path_factory, live_checkpoint) -> Case:
    folder = live_checkpoint(request.param)
    return make_case(folder, tmp_path_factory.mktemp("adapter") / request.param)


def our_name(theirs: str, ours: set[str]) -> str:
    """What a tensor that PyTorch trains is called here."""
    if theirs in ENCODER:
        (found,) = [name for name in ours if name.endswith(f"encoder.{ENCODER[theirs]}")]
        return found
    name = theirs.removeprefix("base_model.model.").replace(".default.weight", "")
    name = name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
    # The head's LoRA of a tied model is the embedding's.
    tied = name.replace("lm_head", "model.embed_tokens")
    return tied if tied in ours else name


def test_loss_and_gradients_are_those_of_pytorch_and_peft(case):
    loss, found = case.loss_and_gradients()
    reference = load_trainable(case.folder / "base", case.folder / "checkpoint")
    wanted_loss, wanted = loss_and_gradients(reference, case.rows)
    assert abs(loss - wanted_loss) < 1e-5 * wanted_loss
    wanted = {our_name(name, set(found)): (name, array.numpy()) for name, array in wanted.items()}
    assert set(wanted) == set(found)
    assert len([name for name in found if ".encoder." in name]) == len(ENCODER)
    for name, (theirs, array) in wanted.items():
        gradient = np.array(found[name])
        gradient = gradient.T if "lora_" in name else gradient
        assert gradient.shape == array.shape, theirs
        largest = np.abs(array).max()
        assert largest > 1e-6, theirs
        assert np.abs(gradient - array).max() < 1e-3 * largest, theirs
