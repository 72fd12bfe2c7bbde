"""Which tokens the methods keep that read a prompt before: against PyTorch, and by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx import load
from kmerge_mlx.evaluation.baselines import (
    METHODS,
    SelectiveContext,
    SpecPrefill,
    spec_prefill,
    weighing,
)
from kmerge_mlx.prompts.segments import Segment
from tests.conftest import UPSTREAM
from tests.evaluation.baselines.by_hand import attention, chunks, heaviest, surprise
from tests.evaluations import measured, questions_of, write_data
from tests.tiny import build, prompts_of, qwen2_config, write_base
from tests.tools.test_sizing import BASES

WEIGHING = ("selective-context", "spec-prefill")


@pytest.fixture(scope="module")
def model():
    """Four heads that share two keys."""
    return load(str(UPSTREAM / "base"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 512])
def test_the_weights_are_those_of_transformers(monkeypatch, model, step):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(weighing, "STEP", step)
    how = {"attn_implementation": "eager", "dtype": torch.float32}
    reference = transformers.AutoModelForCausalLM.from_pretrained(UPSTREAM / "base", **how)
    for ids in ([5], *prompts_of(3, 20, 90), list(range(1, 34)), [3] * 32):
        with torch.no_grad():
            said = reference(torch.tensor([ids]), output_attentions=True)
        logprobs = torch.log_softmax(said.logits[0], dim=-1)
        wanted = [np.inf, *(-logprobs[i, token].item() for i, token in enumerate(ids[1:]))]
        found = SelectiveContext(2).weigh(model, mx.array(ids))
        assert found.tolist() == pytest.approx(wanted, abs=1e-4)
        heads = torch.cat(said.attentions, dim=1)[0, :, -spec_prefill.LAST :]  # of all layers
        wanted = heads.amax(dim=0).mean(dim=0)
        found = SpecPrefill(2).weigh(model, mx.array(ids))
        assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("name", WEIGHING)
def test_the_heaviest_of_each_run_stay_in_their_order_beside_what_is_raw(model, name, k):
    one, two = prompts_of(2, 30, 60, seed=k)
    segments = [Segment([7, 8], False), Segment(one), Segment([9], False), Segment(two)]
    ids = [7, 8, *one, 9, *two]
    weights = surprise(model, ids) if name == "selective-context" else attention(model, ids)
    runs = weights[2 : 2 + len(one)], weights[-len(two) :]
    if name == "spec-prefill":  # a chunk begins where its run does
        runs = [chunks(run) for run in runs]
    wanted = [heaviest(r, w, -(-len(r) // k)) for r, w in zip((one, two), runs, strict=True)]
    read = METHODS[name](k).read(model, segments)
    assert [list(part.ids) for part in read] == [[7, 8], wanted[0], [9], wanted[1]]
    assert not any(part.merge for part in read)


def test_what_is_raw_alone_is_read_without_a_pass(model):
    segments = [Segment([1, 2, 3], False)]
    for name in WEIGHING:
        assert METHODS[name](4).read(None, segments) == segments


GEMMA = {
    **qwen2_config(head_dim=16, query_pre_attn_scalar=16),
    "sliding_window": 16,
    "sliding_window_pattern": 2,
}


def test_layers_of_sliding_windows_are_left_out_of_long_prompts(monkeypatch):
    """Gemma 3: a layer with a window, then one that sees everything."""
    monkeypatch.setattr(weighing, "STEP", 32)
    model, ids = build(GEMMA | {"model_type": "gemma3_text"}), mx.array(prompts_of(1, 80, 80)[0])
    weights = SpecPrefill(2).weigh(model, ids)
    assert weights.shape == (80,)
    assert weights[:40].min().item() > 0  # further away than the window


def test_a_model_whose_attention_cannot_be_seen_is_left_out(tmp_path):
    """Gemma 2 multiplies by hand in mlx-lm."""
    base = write_base(tmp_path / "base", GEMMA | {"model_type": "gemma2"})
    data = str(write_data(tmp_path / "data", questions_of(3)))
    methods = ("spec-prefill", "truncate")
    report = measured(model=str(base), data=data, k=(2,), baseline=methods, max_tokens=1)
    assert [(row.method, row.k) for row in report.rows] == [("truncate", 2), ("spec-prefill", 2)]
    assert "no layer with attention to the whole prompt" in report.rows[1].refused
    assert [row.method for row in report.measured] == ["truncate"]


def test_attention_sinks_and_masks_take_their_share():
    """By hand, for one query of one head."""
    queries, keys = mx.array([[[[1.0]]]]), mx.array([[[[0.0], [1.0], [2.0]]]])
    shares = np.exp([0.0, 1.0, 2.0])
    for mask, sinks, wanted in [
        (None, None, shares / shares.sum()),
        (None, mx.array([1.0]), shares / (shares.sum() + np.e)),
        (mx.array([[True, True, False]]), None, [*shares[:2] / shares[:2].sum(), 0]),
        (
            mx.array([[[[0.0, 1.0, -np.inf]]]]),
            None,
            [1 / (1 + np.e**2), np.e**2 / (1 + np.e**2), 0],
        ),
    ]:
        found = spec_prefill._weights(queries, keys, 1.0, mask, sinks)
        assert found.tolist()[0] == pytest.approx(list(wanted), abs=1e-6)


def test_mlx_has_its_own_attention_again_after_a_pass(model):
    plain = mx.fast.scaled_dot_product_attention
    SpecPrefill(2).weigh(model, mx.array([1, 2, 3]))
    assert mx.fast.scaled_dot_product_attention is plain


@pytest.mark.parametrize("name", BASES)
def test_models_of_every_kind_of_cache_are_weighed_alike_in_steps(monkeypatch, name):
    model, ids = build(qwen2_config(**BASES[name])), mx.array(prompts_of(1, 60, 60)[0])
    for method in map(METHODS.get, WEIGHING):
        found = []
        for step in (16, 512):
            monkeypatch.setattr(weighing, "STEP", step)
            found.append(method(2).weigh(model, ids).tolist())
        assert len(found[0]) == 60
        assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)
