"""Virtual tokens: how a block of K tokens becomes one id that the language model reads.

A merged embedding depends only on the token ids that the encoder reads: the block's own K, and with
an encoder context of c the c before it; of a window encoder, the window up to the block's end. So
every distinct block gets an id past the vocabulary, and :class:`MergedEmbedding`, where the
embedding table stood in the model, reads both kinds of id:

    block (token ids)  ->  id V + slot  ->  row ``slot``

The language model goes on taking ids, so all of mlx-lm (prompt caches, batches, sampling) works on
compressed prompts unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn

from kmerge_mlx.adapters.schema import LoRASpec
from kmerge_mlx.config import MAX_BLOCKS
from kmerge_mlx.encoder import Encoder, Run
from kmerge_mlx.errors import BlockTableFullError, PromptError, short
from kmerge_mlx.prompts.segments import Segment, check_ids

Block = Hashable
"""What an encoder knows a block by: see ``Encoder.keys``."""


@dataclass(eq=False)
class CompressedPrompt:
    """A prompt as the language model reads it; while it lives, so do its blocks.

    Args:
        ids: One id a position: ordinary below V, virtual from V on.
        original_ids: The prompt's own token ids, without the padding of its last block.
        lengths: How many original tokens each position stands for.
        table: The block table that its virtual ids belong to, or None without merging.
        whole: The prompt this one is the rest of, kept alive with it.
    """

    ids: list[int]
    original_ids: list[int]
    lengths: list[int] = field(repr=False)
    table: BlockTable | None = field(default=None, repr=False)
    whole: CompressedPrompt | None = field(default=None, repr=False)

    @property
    def compression_ratio(self) -> float:
        """Original tokens per position."""
        return len(self.original_ids) / len(self.ids)

    def after(self, positions: int) -> CompressedPrompt:
        """What is left to read when a KV cache holds the first ``positions`` of this prompt."""
        tokens = sum(self.lengths[:positions])
        ids, original_ids = self.ids[positions:], self.original_ids[tokens:]
        return CompressedPrompt(ids, original_ids, self.lengths[positions:], self.table, self)


class BlockTable:
    """Gives each distinct block a slot; ``capacity`` bounds the number of slots.

    A block keeps its slot as long as a live :class:`CompressedPrompt` or the key of a KV cache
    names it: otherwise different texts would share a prefix. When the slots run out, all that
    nothing names are freed at once (mark and sweep).
    """

    def __init__(self, vocab_size: int, capacity: int = MAX_BLOCKS):
        self.vocab_size, self.capacity = vocab_size, capacity
        self._slot_of: dict[Block, int] = {}
        self._free: list[int] = []  # of the slots that a block once had
        self.rowless: dict[int, Block] = {}  # slots whose row was not needed yet
        self.prompts: WeakSet[CompressedPrompt] = WeakSet()  # they keep their slots
        self.cached_ids: Callable[[], Iterable[Sequence[int]]] = lambda: ()  # of KV caches, too

    def __len__(self) -> int:
        return len(self._slot_of)

    def intern(self, blocks: Sequence[Block]) -> tuple[list[int], dict[int, Block]]:
        """The virtual id of each block, and the slots that are new, which have no row yet.

        A BlockTableFullError leaves the table as it was.
        """
        distinct = dict.fromkeys(blocks)
        missing = [block for block in distinct if block not in self._slot_of]
        if len(missing) > self.capacity - len(self):
            self._sweep(keep={self._slot_of[b] for b in distinct if b in self._slot_of})
            if len(missing) > self.capacity - len(self):
                raise BlockTableFullError(
                    f"{len(missing):,} new blocks, but {len(self):,} of {self.capacity:,} slots "
                    "are in use by live prompts and caches: drop some of them, use fewer prompts "
                    "at once, or load the model with a larger max_blocks"
                )
        new: dict[int, Block] = {}
        for block in missing:
            slot = self._free.pop() if self._free else len(self)
            self._slot_of[block], new[slot] = slot, block
        self.rowless |= new
        return [self.vocab_size + self._slot_of[block] for block in blocks], new

    def forget(self, slots: dict[int, Block]) -> None:
        """Frees slots, given with their blocks."""
        for slot, block in slots.items():
            del self._slot_of[block]
            self.rowless.pop(slot, None)
            self._free.append(slot)

    def _sweep(self, keep: set[int]) -> None:
        named = [*(prompt.ids for prompt in self.prompts), *self.cached_ids()]
        keep.update(i - self.vocab_size for ids in named for i in ids if i >= self.vocab_size)
        self.forget({slot: block for block, slot in self._slot_of.items() if slot not in keep})


class MergedEmbedding(nn.Module):
    """An embedding that also reads virtual ids, and a tied output head that may carry LoRA.

    PEFT's ``lm_head`` adapter changes only the output side of a tied model, which is why it cannot
    live in mlx-lm's ``LoRAEmbedding``. Without an encoder nothing is merged (K = 1).
    """

    def __init__(
        self,
        embedding: nn.Module,
        encoder: Encoder | None,
        pad_token_id: int,
        max_blocks: int = MAX_BLOCKS,
    ):
        super().__init__()
        self.embedding, self.encoder = embedding, encoder
        self.pad_token_id, self.vocab_size = pad_token_id, embedding.weight.shape[0]
        self.head_calls, self.max_blocks, self.folded = 0, max_blocks, False
        self.forget_blocks()

    @property
    def merge_factor(self) -> int:
        """K, how many tokens one merged position stands for."""
        return 1 if self.encoder is None else self.encoder.config.merge_factor

    @property
    def context(self) -> int:
        """c, how many tokens before its block the encoder reads."""
        return 0 if self.encoder is None else getattr(self.encoder.config, "context", 0)

    @property
    def hidden_size(self) -> int:
        """D, the width of the base table (a quantized table's weight is packed)."""
        return self._rows.shape[-1]

    @property
    def dtype(self) -> mx.Dtype:
        """Of embeddings: what the model computes in."""
        return self._rows.dtype

    @property
    def weight(self) -> mx.array:
        """The base table's weight ``(V, D)``: some mlx-lm models read it directly."""
        return self.embedding.weight

    def add_head_lora(self, spec: LoRASpec, dropout: float = 0.0) -> None:
        """Adds LoRA to the tied output head: ``lora_a`` (D, r) and ``lora_b`` (r, V), B zero."""
        d, bound = self.hidden_size, self.hidden_size**-0.5
        self.head_scale, self.head_dropout = spec.scale, nn.Dropout(dropout)
        self.lora_a = mx.random.uniform(-bound, bound, (d, spec.rank))
        self.lora_b = mx.zeros((spec.rank, self.vocab_size))

    def __call__(self, ids: mx.array) -> mx.array:
        """Ordinary and virtual ids ``(...)`` to embeddings ``(..., D)`` in the base's dtype."""
        virtual = ids >= self.vocab_size
        # MLX does not check indices: whatever an id is, the rows are read in range.
        base = self.embedding(mx.where(virtual, 0, ids))
        rows = self._rows[mx.clip(ids - self.vocab_size, 0, self._rows.shape[0] - 1)]
        return mx.where(virtual[..., None], rows.astype(base.dtype), base)

    def as_linear(self, x: mx.array) -> mx.array:
        """The tied output head: hidden states ``(..., D)`` to logits ``(..., V)``."""
        self.head_calls += 1
        logits = self.embedding.as_linear(x)
        if "lora_a" not in self:
            return logits
        inner = self.head_dropout(x) @ self.lora_a
        inner = inner if self.folded else self.head_scale * inner
        return mx.addmm(logits, inner, self.lora_b).astype(x.dtype)

    def fold_head_lora(self) -> None:
        """Folds scale and dtype into the head's LoRA, if it has one, as ``lora.fold`` does."""
        if "lora_a" in self and not self.folded:
            self.lora_a = self.lora_a.astype(self.dtype)
            self.lora_b = (self.head_scale * self.lora_b).astype(self.dtype)
        self.folded = True

    def forget_blocks(self) -> None:
        """Starts an empty block table, as after training; prompts of the old one are refused."""
        self.table = BlockTable(self.vocab_size, self.max_blocks)
        # The leading underscore keeps the rows out of parameters(): they are a cache.
        self._rows = mx.zeros_like(self.embedding(mx.array([0])))

    @contextmanager
    def reading(self, rows: mx.array) -> Iterator[None]:
        """Makes id V + i read row i of ``rows`` ``(M, D)``, through which gradients flow."""
        kept, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = kept

    def compress(
        self, segments: Iterable[Segment], k: int | None = None, cached: int = 0
    ) -> CompressedPrompt:
        """Turns a prompt into ids that the language model reads; a block is encoded once.

        Blocks never straddle two segments, and keep their slots while the returned object lives.
        ``k`` is another merge factor that there is an encoder for, or 1, which merges nothing.
        The blocks of the first ``cached`` positions, which a KV cache holds, need not be encoded.
        """
        segments, k = list(segments), self.merge_factor if k is None else k
        if k not in (has := {1, self.merge_factor, *getattr(self.encoder, "ks", ())}):
            have = ", ".join(map(str, sorted(has)))
            raise PromptError(f"`k` is {short(k)}, this model reads prompts at K = {have}")
        original_ids = [i for segment in segments for i in segment.ids]
        self.check(segments)
        merged = [s.ids if s.merge and k > 1 else () for s in segments]
        cut = [self.keys(ids, k) if ids else [] for ids in merged]
        found, new = self.table.intern([block for blocks in cut for block in blocks])
        virtual = iter(found)
        ids: list[int] = []
        lengths: list[int] = []
        for segment, blocks in zip(segments, cut, strict=True):
            count = len(segment.ids)
            ids += [next(virtual) for _ in blocks] or segment.ids
            lengths += [min(k, count - i * k) for i in range(len(blocks))] or [1] * count
        try:
            self._encode(ids[cached:], list(zip(merged, cut, strict=True)))
        except BaseException:  # Ctrl-C included
            self.table.forget(new)
            raise
        prompt = CompressedPrompt(ids, original_ids, lengths, self.table)
        self.table.prompts.add(prompt)
        return prompt

    def check(self, segments: Iterable[Segment], tokenizer: Any = None) -> None:
        """Refuses token ids that have no row in the table that reads them (see ``check_ids``)."""
        own = getattr(self.encoder, "table_rows", None)
        for segment in segments:
            check_ids(segment.ids, (segment.merge and own) or self.vocab_size, tokenizer)

    def keys(self, ids: Sequence[int], k: int | None = None) -> list[Block]:
        """The blocks of a run of tokens that merges."""
        other = () if k in (None, self.merge_factor) else (k,)
        return self.encoder.keys(ids, self.pad_token_id, *other)

    def _encode(self, ids: Sequence[int], runs: Sequence[Run]) -> None:
        """Writes the rows that ids lack; a slot keeps its place in ``rowless`` until it has one."""
        rowless, slots = self.table.rowless, dict.fromkeys(i - self.vocab_size for i in ids)
        if missing := {slot: rowless[slot] for slot in slots if slot in rowless}:
            self._write(missing, runs)
            for slot in missing:
                del rowless[slot]

    def _write(self, new: dict[int, Block], runs: Sequence[Run]) -> None:
        """Encodes blocks, given by slot, and stores their rows, a part in memory at once."""
        (rows, d), needed = self._rows.shape, max(new) + 1
        if needed > rows:  # by doubling, the rows take at most twice the memory in use
            grown = min(max(needed, 2 * rows), self.table.capacity)
            self._rows = mx.concatenate([self._rows, mx.zeros((grown - rows, d), self._rows.dtype)])
        slot_of = {block: slot for slot, block in new.items()}
        for blocks, merged in self.encoder.merge(self.embedding, runs, slot_of):
            slots = mx.array([slot_of[block] for block in blocks])
            self._rows[slots] = merged.astype(self._rows.dtype)
            mx.eval(self._rows)
