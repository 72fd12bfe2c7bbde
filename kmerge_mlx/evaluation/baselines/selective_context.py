"""Selective Context: drops the tokens that the model itself finds least surprising.

Source: Li et al. 2023, arXiv 2310.06201, on single tokens; the baseline of arXiv 2604.15153.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmerge_mlx.evaluation.baselines.weighing import Weighing, in_steps

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


class SelectiveContext(Weighing):
    """Keeps the tokens with the most self-information: -log p of each given those before it."""

    name = "selective-context"
    about = "the T/K tokens that surprise the model most"
    words = "selective context to 1/{k}"

    def weigh(self, model: nn.Module, ids: mx.array) -> mx.array:
        import mlx.core as mx
        import mlx.nn as nn
        from mlx_lm.models.cache import make_prompt_cache

        found, start = [mx.array([mx.inf])], 1  # nothing predicts the first token
        for logits in in_steps(model, ids[:-1], make_prompt_cache(model)):
            end = start + len(logits)
            surprise = nn.losses.cross_entropy(logits.astype(mx.float32), ids[start:end])
            mx.eval(surprise)  # so that no step's logits outlive it
            found.append(surprise)
            start = end
        return mx.concatenate(found)
