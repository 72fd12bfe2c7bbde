"""Fusing beyond one Qwen2: every architecture we claim, nested configs, experts.

Oracle: the base with its adapter, by ``drift`` (whose own oracle is in ``test_quantize.py``).
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from kmerge_mlx import load
from kmerge_mlx.adapters import lora
from kmerge_mlx.adapters.folder import Adapter, save_adapter
from kmerge_mlx.adapters.schema import EncoderConfig, LoRASpec, MergeConfig
from kmerge_mlx.adapters.tuning import LoRAConfig
from kmerge_mlx.model import adapter_of, output_head, wire
from kmerge_mlx.tools.fuse import Fused, fuse
from tests.reference.make_checkpoints import ARCHITECTURES, make_base
from tests.tiny import PAD, qwen2_config, write_base

EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "head_dim": 32,
}


def fused_with_everything(base: Path, home: Path, **options: object) -> Fused:
    """Fuses random LoRA on everything that mlx-lm puts it on, and on the head."""
    model, _ = load(str(base))
    spec = LoRASpec(4, 2.0)
    sizes = EncoderConfig(3, 64, 128)
    merge = MergeConfig(sizes, pad_token_id=PAD, head_lora=spec)
    tuning = LoRAConfig(len(model.layers), 0.0, spec, lora.default_keys(model))
    wire(model, merge, tuning, PAD)
    fresh = adapter_of(model, merge, tuning)
    mx.random.seed(1)
    parts = (fresh.tuning_weights, fresh.encoder_weights, fresh.head_weights)
    random = [{n: mx.random.normal(a.shape, scale=0.1) for n, a in part.items()} for part in parts]
    save_adapter(Adapter(merge, tuning, *random), home / "adapter")
    return fuse(str(base), home / "adapter", home / "fused", **options)


def assert_same(done: Fused) -> None:
    assert max(done.drift.plain.max, done.drift.merged.max) < 1e-3
    assert done.drift.plain.same > 0.99


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_we_claim_says_the_same_when_fused(tmp_path, name):
    base = tmp_path / "base"
    base.mkdir()
    make_base(base, name)
    done = fused_with_everything(base, tmp_path)
    assert_same(done)
    assert done.untied == ARCHITECTURES[name].tied
    model, _ = load(str(tmp_path / "fused"))
    assert output_head(model) is not None


def test_a_nested_config_is_untied_where_the_model_reads_it(tmp_path):
    config = {"model_type": "mistral3", "text_config": qwen2_config(model_type="llama")}
    done = fused_with_everything(write_base(tmp_path / "base", config), tmp_path)
    assert_same(done)
    assert done.untied
    written = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert written["text_config"]["tie_word_embeddings"] is False
    assert output_head(load(str(tmp_path / "fused"))[0])[0] == "language_model.lm_head"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_on_experts_is_fused_too(tmp_path, tied):
    config = qwen2_config(**EXPERTS, tie_word_embeddings=tied)
    assert_same(fused_with_everything(write_base(tmp_path / "base", config), tmp_path))


def test_quantized_experts_are_dequantized_when_asked(tmp_path):
    config = qwen2_config(**EXPERTS, quantization={"group_size": 32, "bits": 4})
    base = write_base(tmp_path / "base", config)
    assert_same(fused_with_everything(base, tmp_path, dequantize=True))
    (tmp_path / "again").mkdir()
    done = fused_with_everything(base, tmp_path / "again")
    assert done.quantized
    assert done.drift.plain.max > 1e-3
