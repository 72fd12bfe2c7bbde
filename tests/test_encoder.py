"""The merge encoder's arithmetic, against the formula in numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx.adapters.schema import EncoderConfig, inner_size
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.virtual_tokens import MergeEncoder


def filled(k: int, d: int, h: int, c: int = 0) -> MergeEncoder:
    mx.random.seed(k)
    encoder = MergeEncoder(EncoderConfig(k, d, h, c))
    for layer in (encoder.w1, encoder.w2, encoder.w3):
        layer.weight = mx.random.normal(layer.weight.shape, scale=0.2)
        layer.bias = mx.random.normal(layer.bias.shape, scale=0.2)
    return encoder


def test_a_new_encoder_is_exactly_the_mean_of_the_block():
    for k, c in ((2, 0), (3, 0), (4, 3), (5, 1), (17, 0)):
        encoder = MergeEncoder(EncoderConfig(k, 16, inner_size(k, 16), c))
        read = mx.random.normal((7, c + k, 16))
        assert mx.array_equal(encoder(read), read[:, c:].mean(axis=1))


@pytest.mark.parametrize("c", [0, 1, 3, 7])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_the_encoder_is_mean_plus_three_layer_relu_mlp(k, c):
    """The MLP reads the context too, the mean is the block's own."""
    encoder, read = filled(k, 8, 24, c), np.random.default_rng(k).normal(size=(5, c + k, 8))
    x, blocks = read.reshape(5, -1), read[:, c:]
    for i, layer in enumerate((encoder.w1, encoder.w2, encoder.w3)):
        x = x @ np.array(layer.weight).T + np.array(layer.bias)
        x = np.maximum(x, 0) if i < 2 else x
    found = np.array(encoder(mx.array(read, mx.float32)))
    np.testing.assert_allclose(found, blocks.mean(axis=1) + x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("c", [0, 3])
def test_the_config_names_the_shapes_that_the_encoder_has(c):
    encoder = filled(4, 8, 24, c)
    found = {name: array.shape for name, array in tree_flatten(encoder.parameters())}
    assert found == encoder.config.shapes()
    assert found["w1.weight"] == (24, (4 + c) * 8)
    assert encoder.config.num_parameters == sum(a.size for _, a in tree_flatten(encoder))


def test_chunks_give_what_one_pass_gives():
    encoder, table = filled(3, 8, 16), mx.random.normal((50, 8))
    blocks = mx.random.randint(0, 50, (23, 3))
    whole = encoder(table[blocks])
    chunks = list(encoder.in_chunks(lambda ids: table[ids], blocks, chunk_size=5))
    assert [chunk.shape[0] for chunk in chunks] == [5, 5, 5, 5, 3]
    assert mx.allclose(mx.concatenate(chunks), whole, rtol=0, atol=1e-6)


def test_the_encoder_computes_in_its_own_dtype():
    encoder = filled(2, 8, 16)
    assert encoder(mx.zeros((3, 2, 8), mx.bfloat16)).dtype == mx.float32
    encoder.set_dtype(mx.float16)
    assert encoder(mx.zeros((3, 2, 8), mx.float32)).dtype == mx.float16


def test_sizes_that_an_encoder_cannot_have_are_refused():
    for sizes in (
        *((1, 8, 8), (2, 0, 8), (2, 8, -1), (2.0, 8, 8), (True, 8, 8)),
        *((2, 8, 8, -1), (2, 8, 8, 1.0), (2, 8, 8, None)),
    ):
        with pytest.raises(AdapterError, match="expected a whole number"):
            EncoderConfig(*sizes)


def test_the_default_sizes_are_the_papers():
    assert [inner_size(k, 896) // 896 for k in (2, 3, 4)] == [4, 6, 6]
    assert inner_size(5, 10) == 70
    # Millions of parameters at D = 896.
    counts = [EncoderConfig(k, 896, inner_size(k, 896)).num_parameters for k in (2, 3, 4)]
    assert [round(count / 1e6, 1) for count in counts] == [14.5, 31.3, 41.8]
