"""The merge encoder: K token embeddings to one merged embedding.

Source: arXiv 2604.15153 section 3.2: block mean plus a 3-layer ReLU MLP over the K embeddings laid
end to end. The paper calls it average-initialised; here the last layer starts at zero, so training
starts at exactly the mean. Beyond the paper, the MLP may also read c tokens before the block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from kmerge_mlx.adapters.schema import INFORMATION, EncoderConfig
from kmerge_mlx.config import BLOCKS_PER_CHUNK

Block = tuple[int, ...]
Run = tuple[Sequence[int], Sequence[Any]]  # token ids that merge, and the key of each position

EXPONENT = 4
"""How sharply rare tokens outweigh frequent ones."""
LEAST, MOST = 1.0, 14.0  # self-information that counts, in nats


class Encoder(Protocol):
    """What makes merged embeddings of runs of tokens, one for every K: a block's position.

    A merged embedding depends on what its key was made of, and on nothing else.
    """

    config: Any
    table_rows: int | None
    """How many token ids it knows; None: as many as the model that answers."""
    num_parameters: int
    dtype: mx.Dtype

    def parameters(self) -> Any:
        """All its arrays, in a tree."""

    def keys(self, ids: Sequence[int], pad_token_id: int) -> list[Any]:
        """A hashable key for each position of a run; ``pad_token_id`` fills up the last block."""

    def merge(
        self, table: nn.Module, runs: Iterable[Run], wanted: Collection[Any]
    ) -> Iterator[tuple[list[Any], mx.array]]:
        """The merged embeddings ``(M, D)`` of the wanted keys of some runs, a part at once.

        ``table`` is the embedding table of the model that answers.
        """


class MergeEncoder(nn.Module):
    """``f(e_1..e_K) = mean(e) + W3 relu(W2 relu(W1 [e_1;..;e_K]))``, every W with a bias.

    With a context of c, W1 reads ``[e_1-c;..;e_0;e_1;..;e_K]``; the mean is over the block alone.

    The start ``information`` has another term in place of the mean. In a pretrained table, frequent
    words lie further from the table's ``center`` than rare ones, so that a mean is mostly function
    words, and shorter than any token. This term adds up directions from the center, each weighed by
    its token's self-information (read from its embedding by ``gate_weight`` and ``gate_bias``), and
    has a token's length. The MLP reads those directions, at a root mean square of 1, and what it
    gives is measured in that length too: one learning rate then fits any table.

    Args:
        config: K, D, H and c, and how the weights are packed, if they are.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config, self.table_rows = config, None
        widths = config.layers().values()
        self.w1, self.w2, self.w3 = (nn.Linear(inner, out) for out, inner in widths)
        self.w3.weight = mx.zeros_like(self.w3.weight)
        self.w3.bias = mx.zeros_like(self.w3.bias)
        if config.start == INFORMATION:
            self.center = mx.zeros(config.hidden_size)
            self.gate_weight, self.gate_bias = mx.zeros(config.hidden_size), mx.ones(1)
        if config.quantization is not None:
            nn.quantize(self, config.quantization.group_size, config.quantization.bits)

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds, packed or not."""
        return self.config.num_parameters

    @property
    def dtype(self) -> mx.Dtype:
        """Of merged embeddings."""
        return self.w3.bias.dtype

    def keys(self, ids: Sequence[int], pad_token_id: int) -> list[Block]:
        """The blocks of a run: the token ids that the encoder reads."""
        return split(ids, self.config.merge_factor, pad_token_id, self.config.context)

    def merge(
        self, table: nn.Module, runs: Iterable[Run], wanted: Collection[Block]
    ) -> Iterator[tuple[list[Block], mx.array]]:
        """The merged embeddings of blocks, a bounded number at once; see :class:`Encoder`."""
        blocks = list(wanted)
        for start in range(0, len(blocks), BLOCKS_PER_CHUNK):
            part = blocks[start : start + BLOCKS_PER_CHUNK]
            yield part, self(table(mx.array(part)))

    def __call__(self, embeddings: mx.array) -> mx.array:
        """Merges blocks.

        Args:
            embeddings: ``(N, c + K, D)``, any float dtype: c before each block, then its own K.

        Returns:
            Merged embeddings ``(N, D)`` in the encoder's dtype.
        """
        x = embeddings.astype(self.dtype)
        if self.config.start != INFORMATION:
            return x[:, self.config.context :].mean(axis=1) + self._mlp(x)
        apart = x - self.center
        lengths = mx.maximum(mx.linalg.norm(apart, axis=-1, keepdims=True), 1e-3)  # (N, c + K, 1)
        units, own = apart / lengths, slice(self.config.context, None)
        nats = mx.clip(x[:, own] @ self.gate_weight + self.gate_bias, LEAST, MOST)  # (N, K)
        weights = mx.softmax(EXPONENT * mx.log(nats), axis=1)[..., None]
        direction = (weights * units[:, own]).sum(axis=1)
        whole = mx.maximum(mx.linalg.norm(direction, axis=-1, keepdims=True), 1e-3)
        length, rms = (weights * lengths[:, own]).sum(axis=1), self.config.hidden_size**0.5
        return self.center + length * (direction / whole + self._mlp(units * rms) / rms)

    def _mlp(self, x: mx.array) -> mx.array:
        """``(N, c + K, D)`` to ``(N, D)``."""
        hidden = nn.relu(self.w1(x.reshape(x.shape[0], -1)))
        return self.w3(nn.relu(self.w2(hidden)))


def split(
    ids: Sequence[int], merge_factor: int, pad_token_id: int, context: int = 0
) -> list[Block]:
    """Cuts one segment's token ids into blocks of K, each led by the c ids before it.

    The padding token fills up the last block, and stands for what is missing before the first.

    Source: arXiv 2604.15153 section 3.1; the padding token is that of the paper's code (a space).
    """
    width = context + merge_factor
    padded = [*[pad_token_id] * context, *ids, *[pad_token_id] * (-len(ids) % merge_factor)]
    return [tuple(padded[i : i + width]) for i in range(0, len(padded) - context, merge_factor)]
