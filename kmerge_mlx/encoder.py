"""The merge encoder: K token embeddings to one merged embedding.

Source: arXiv 2604.15153 section 3.2: block mean plus a 3-layer ReLU MLP over the K embeddings laid
end to end. The paper calls it average-initialised; here the last layer starts at zero, so training
starts at exactly the mean. Beyond the paper, the MLP may also read c tokens before the block.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from kmerge_mlx.adapters.schema import EncoderConfig


class MergeEncoder(nn.Module):
    """``f(e_1..e_K) = mean(e) + W3 relu(W2 relu(W1 [e_1;..;e_K]))``, every W with a bias.

    With a context of c, W1 reads ``[e_1-c;..;e_0;e_1;..;e_K]``; the mean is over the block alone.

    Args:
        config: K, D, H and c, and how the weights are packed, if they are.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        widths = config.layers().values()
        self.w1, self.w2, self.w3 = (nn.Linear(inner, out) for out, inner in widths)
        self.w3.weight = mx.zeros_like(self.w3.weight)
        self.w3.bias = mx.zeros_like(self.w3.bias)
        if config.quantization is not None:
            nn.quantize(self, config.quantization.group_size, config.quantization.bits)

    def __call__(self, embeddings: mx.array) -> mx.array:
        """Merges blocks.

        Args:
            embeddings: ``(N, c + K, D)``, any float dtype: c before each block, then its own K.

        Returns:
            Merged embeddings ``(N, D)`` in the encoder's dtype.
        """
        x = embeddings.astype(self.w3.bias.dtype)
        hidden = nn.relu(self.w1(x.reshape(x.shape[0], -1)))
        hidden = nn.relu(self.w2(hidden))
        return x[:, self.config.context :].mean(axis=1) + self.w3(hidden)
