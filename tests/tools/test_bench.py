"""The benchmark's measuring: what is read, in which order, and what the figures are made of."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from kmerge_mlx import load
from kmerge_mlx.generation import cost
from kmerge_mlx.generation.cost import Spread
from kmerge_mlx.model import load_source
from kmerge_mlx.prompts.segments import Segment
from kmerge_mlx.source import Source
from kmerge_mlx.tools import bench as benchmark
from kmerge_mlx.tools.bench import BenchmarkConfig, Side, Trial
from tests.tiny import VOCAB_SIZE, qwen2_config, write_base

CONFIG = BenchmarkConfig((21,), 2, 3, prefill_step_size=2048, seed=0, delay=0)
# Keys and values of the fixture's 2 layers of 2 heads, 32 wide, in float32.
POSITION_BYTES = 2 * 2 * 2 * 32 * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A tiny base in which every token would end an answer."""
    folder = tmp_path_factory.mktemp("base") / "base"
    return str(write_base(folder, qwen2_config(eos_token_id=list(range(VOCAB_SIZE)))))


@pytest.fixture(scope="module")
def sides(base) -> list[Side]:
    """Plain, and floor and untrained encoder for K = 2 and 4."""
    return load_sides(base, {2: None, 4: None}, (300,))


@pytest.fixture
def runs(monkeypatch) -> list[tuple[object, list[int]]]:
    """What each run of the benchmark gives to mlx-lm: the model, and the ids."""
    seen = []
    plain = cost.generate_step

    def spy(prompt, model, **options):
        seen.append((model, prompt.tolist()))
        return plain(prompt, model, **options)

    monkeypatch.setattr(cost, "generate_step", spy)
    return seen


def load_sides(
    base: str, ks: dict[int, object], lengths: tuple[int, ...], lora_rank: int = 0
) -> list[Side]:
    """Loads a base, and an adapter folder (or None: an untrained encoder) for each K."""
    merged = {k: path and Source.find(base, str(path), k) for k, path in ks.items()}
    return benchmark.load_sides(Source.find(base), merged, lengths, lora_rank)


def in_rounds(seen: list, size: int) -> list[list]:
    return [seen[i : i + size] for i in range(0, len(seen), size)]


def test_the_kv_cache_is_exactly_that_of_ceil_t_over_k_positions(sides):
    rows = benchmark.measure(sides, replace(CONFIG, lengths=(7, 300), num_trials=1))
    found = [(row.length, row.k, row.positions) for row in rows]
    assert found == [(n, k, -(-n // k)) for n in (7, 300) for k in (1, 2, 4)]
    for row in rows:
        assert row.figures.kv_bytes == row.positions * POSITION_BYTES
        assert row.floor is None or row.floor.kv_bytes == row.figures.kv_bytes
        assert row.figures.generation_tps is not None  # an end-of-text token ends nothing


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_without_an_adapter_lora_is_on_every_layer_and_the_head_or_nowhere(base_path, lora_rank):
    plain, floor, merged = load_sides(str(base_path), {4: None}, (40,), lora_rank)
    names = [name for name, _ in tree_flatten(merged.llm.parameters()) if "lora_a" in name]
    layers = [f"layers.{i}." for i in range(len(plain.llm.layers))]
    assert [any(layer in name for name in names) for layer in layers] == [bool(lora_rank)] * 3
    assert len(names) == (len(layers) * 7 + 1 if lora_rank else 0)
    assert plain.llm is floor.llm
    assert not [n for n, _ in tree_flatten(plain.llm.parameters()) if "lora_a" in n]


def test_the_sides_are_interleaved_and_take_turns_at_being_first(sides, runs):
    benchmark.measure(sides, replace(CONFIG, num_trials=5))
    names = {(id(side.llm), side.positions(21)): i for i, side in enumerate(sides)}
    rounds = in_rounds([names[id(model), len(ids)] for model, ids in runs], len(sides))
    assert len(rounds) == 1 + 5
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in rounds)
    assert {order[0] for order in rounds[1:]} == {0, 1, 2, 3, 4}
    for floor, merged in ((1, 2), (3, 4)):
        earlier = [order.index(floor) < order.index(merged) for order in rounds[1:]]
        assert 2 <= sum(earlier) <= 3


def test_every_round_draws_new_tokens_which_all_its_sides_read(sides, runs):
    benchmark.measure(sides, replace(CONFIG, lengths=(20, 21)))
    prompts = []
    for group in in_rounds(runs, 5):
        plain = [ids for model, ids in group if model is sides[0].llm]
        whole = max(plain, key=len)
        assert sorted(map(len, plain)) == [-(-len(whole) // k) for k in (4, 2, 1)]
        assert all(ids == whole[: len(ids)] for ids in plain)
        prompts.append(tuple(whole))
    assert len(set(prompts)) == len(prompts) == 2 * 3
    drawn = [i for prompt in prompts for i in prompt]
    assert 0 <= min(drawn) < 50 < VOCAB_SIZE - 50 < max(drawn) < VOCAB_SIZE


def test_ratios_are_of_runs_in_the_same_round(sides, monkeypatch):
    """Rounds of very different speed: the ratio of the medians would be another number."""
    scale = iter([9.0] * 3 + [1.0] * 3 + [10.0] * 3 + [100.0] * 3)
    seconds = {sides[0]: 8.0, sides[1]: 2.0, sides[2]: 4.0}
    faster = {1.0: 1, 10.0: 2, 100.0: 4, 9.0: 1}

    def run(side, ids, config):
        factor = next(scale)
        once = seconds[side] * factor / (faster[factor] if side is sides[2] else 1)
        return Trial(len(ids), side.positions(len(ids)), once, None, 1, 1)

    monkeypatch.setattr(benchmark, "_run", run)
    plain, merged = benchmark.measure(sides[:3], replace(CONFIG, num_trials=3))
    assert plain.figures.time_to_first_token.trials == (8.0, 80.0, 800.0)
    assert plain.figures.cold_time_to_first_token == 8.0 * 9  # of the round that warms up
    assert merged.speedup == Spread(4.0, 2.0, 8.0, (2.0, 4.0, 8.0))
    assert merged.overhead == Spread(1.0, 0.5, 2.0, (2.0, 1.0, 0.5))
    assert merged.figures.prompt_tps.trials == (21 / 4, 21 / 20, 21 / 100)
    assert merged.figures.generation_tps is None


def test_an_adapters_side_is_the_loaded_model_and_the_plain_ones_are_the_base(
    base_path, adapter_path
):
    plain, floor, merged = load_sides(str(base_path), {4: adapter_path}, (40,))
    wanted, _ = load(str(base_path), adapter_path, 4)
    ids = mx.array([[3, 1, 4, 1, 5, 700]])  # the last is the first virtual id
    block = Segment([9, 2, 6, 5])
    held = [e.compress([block]) for e in (merged.embedding, wanted.model.embed_tokens)]
    assert [prompt.ids for prompt in held] == [[700]] * 2
    assert mx.array_equal(merged.llm(ids), wanted(ids))
    bare, _, _ = load_source(Source.find(str(base_path)))
    assert mx.array_equal(plain.llm(ids[:, :5]), bare(ids[:, :5]))
    assert floor.llm is plain.llm
