"""K = 1: an adapter that merges nothing, the baseline of every comparison.

Oracle: mlx-lm with the same LoRA, which reads the prompt as it is.
"""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx_lm.generate import generate_step

from kmerge_mlx import Segment, compress, load, stream_generate
from kmerge_mlx.adapters.folder import FILES, load_adapter, save_adapter
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.model import attach
from tests.cli_runner import run
from tests.saved_adapters import refused
from tests.tiny import PAD, build, prompts_of, qwen2_config, random_adapter, write_base


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tied base and a folder of adapters for it: k1 (with a head LoRA) and k4."""
    root = tmp_path_factory.mktemp("world")
    write_base(root / "base", qwen2_config())
    model = build(qwen2_config())
    for k in (1, 4):
        save_adapter(random_adapter(model, k), root / "both" / f"k{k}")
    save_adapter(random_adapter(model, 1, head=False), root / "headless")
    (root / "p.txt").write_text("Tree: JN\n+WO, Task: ")
    return root


def test_a_k1_adapter_is_saved_and_loaded_bit_for_bit(world, tmp_path):
    adapter = load_adapter(world / "both", 1)
    assert (adapter.merge.encoder, adapter.encoder_weights) == (None, {})
    save_adapter(adapter, tmp_path / "again")
    for name in FILES:
        ours, theirs = tmp_path / "again" / name, world / "both" / "k1" / name
        assert ours.read_bytes() == theirs.read_bytes()
    # Without a head the file of the merge encoder holds no tensor.
    assert mx.load(str(world / "headless" / "merge_encoder.safetensors")) == {}
    assert load_adapter(world / "headless").head_weights == {}
    with pytest.raises(AdapterError, match="no adapter for `k` 1: it has K = 4"):
        load_adapter(world / "both" / "k4", 1)


def test_a_headless_k1_adapter_is_mlx_lms_own(world):
    model, tokenizer = load(str(world / "base"), world / "headless", 1)
    theirs, _ = mlx_lm.utils.load(str(world / "base"), adapter_path=str(world / "headless"))
    ids = prompts_of(1, 40, 40)[0]
    prompt = compress(model, tokenizer, [Segment(ids[:30]), Segment(ids[30:], False)])
    assert prompt.ids == prompt.original_ids == ids
    assert prompt.compression_ratio == 1.0
    found = stream_generate(model, tokenizer, ids, max_tokens=8)
    for response, (token, logprobs) in zip(
        found, generate_step(mx.array(ids), theirs, max_tokens=8), strict=True
    ):
        assert response.token == token
        assert mx.array_equal(response.logprobs, logprobs)
        assert (response.prompt_tokens, response.compressed_tokens) == (40, 40)


def test_the_command_line_takes_it(world):
    paths = ("--model", world / "base", "--adapter-path", world / "both", "--k", 1)
    result = run("generate", *paths, world / "p.txt", "-m", 3, "--json")
    assert (result.code, result.err) == (0, "")
    answer = json.loads(result.out)
    assert answer["compression_ratio"] == 1.0
    assert answer["prompt_tokens"] == answer["compressed_tokens"]


def test_tensors_that_do_not_belong_to_a_k1_adapter_are_refused(world, tmp_path):
    adapter = load_adapter(world / "both", 1)
    stray = replace(adapter, encoder_weights={"w1.bias": mx.zeros((5,))})
    save_adapter(stray, tmp_path / "a")
    assert "encoder.w1.bias (5,) belongs to nothing here" in refused(tmp_path / "a")
    for shape in ((), (64,), (64, 3), (64, 4, 1)):
        head = adapter.head_weights | {"lora_a": mx.zeros(shape)}
        save_adapter(replace(adapter, head_weights=head), tmp_path / "a")
        assert f"lm_head.lora_a has shape {shape}, expected (" in refused(tmp_path / "a")
    head = adapter.head_weights | {"lora_a": mx.zeros((32, 4))}  # its width is the base's to know
    with pytest.raises(AdapterError, match=r"lora_a has shape \(32, 4\), expected \(64, 4\)"):
        attach(build(qwen2_config()), replace(adapter, head_weights=head), PAD)
