"""The calculator against what is measured: positions, KV bytes, encoders, whole models.

Oracles: MLX's arrays after the project's own generation; sizes that the models' makers publish;
docs/performance.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from kmerge_mlx import MergeEncoder, Segment, load, stream_generate
from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.adapters.schema import EncoderConfig, inner_size
from kmerge_mlx.errors import ModelError
from kmerge_mlx.model import merged_embedding
from kmerge_mlx.tools import bench as benchmark
from kmerge_mlx.tools.bench import BenchmarkConfig
from kmerge_mlx.tools.sizing import MEMORY, SizingConfig, calculate, steps
from tests.tiny import qwen2_config, random_adapter, write_base

CONFIGS = {
    path.stem: path for path in (Path(__file__).parents[1] / "fixtures/configs").glob("*.json")
}
# What Hugging Face says of the published weights: their parameters, a tied head counted once.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
}
KS = (1, 2, 3, 4, 8)


def config_of(name: str) -> dict:
    return json.loads(CONFIGS[name].read_text())


def folder_of(tmp_path: Path, config: dict) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def position_bytes(config: dict) -> int:
    """Keys and values of one position in bfloat16, by the book."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * 2


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_whole_config_gives_the_published_sizes_and_takes_no_memory(name, tmp_path):
    config = config_of(name)
    lengths = (1, 100, 2049, 30_001)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = calculate(folder_of(tmp_path, config), SizingConfig(lengths, KS))
    assert mx.get_peak_memory() - before < 1 << 20
    assert found.base.parameters == PARAMETERS[name]
    assert found.base.weight_bytes == 2 * PARAMETERS[name]
    assert found.base.context_length == config["max_position_embeddings"]
    assert [(row.length, row.k) for row in found.rows] == [(n, k) for n in lengths for k in KS]
    for row in found.rows:
        assert row.kv_bytes == row.positions * position_bytes(config)


@pytest.mark.parametrize("name", PARAMETERS)
def test_encoder_parameters_are_those_of_a_real_encoder(name, tmp_path):
    config = config_of(name)
    factors = calculate(folder_of(tmp_path, config), SizingConfig((1,), KS)).factors
    assert (factors[0].k, factors[0].encoder_parameters, factors[0].encoder_bytes) == (1, 0, 0)
    for factor in factors[1:]:
        d = config["hidden_size"]
        encoder = MergeEncoder(EncoderConfig(factor.k, d, inner_size(factor.k, d)))
        arrays = [array for _, array in tree_flatten(encoder.parameters())]
        assert factor.encoder_parameters == sum(array.size for array in arrays)
        assert factor.encoder_bytes == sum(array.nbytes for array in arrays)


def few_layers(name: str, layers: int) -> dict:
    """A config whose attention is the real one; what its KV cache does not depend on is small."""
    small = {"num_hidden_layers": layers, "intermediate_size": 64, "vocab_size": 700}
    return config_of(name) | small | {"tie_word_embeddings": True, "eos_token_id": 0}


def held(cache: list) -> int:
    """Bytes of the positions that a cache holds, from MLX's own arrays."""
    arrays = [a for c in cache for _, a in tree_flatten(c.keys_and_values())]
    return sum(array.nbytes for array in arrays)


def measured(model, tokenizer, length: int, **options) -> tuple[int, int]:
    """Positions prefilled, and bytes held when the first token is sampled."""
    cache, seen = make_prompt_cache(model, options.pop("max_kv_size", None)), []

    def sample(logprobs):
        seen.append(held(cache))
        return mx.argmax(logprobs, axis=-1)

    prompt = [Segment([5 + i % 600 for i in range(length)])]
    responses = stream_generate(
        model, tokenizer, prompt, max_tokens=1, sampler=sample, prompt_cache=cache, **options
    )
    return [response.compressed_tokens for response in responses][-1], seen[0]


@pytest.mark.parametrize("name", PARAMETERS)
def test_positions_and_kv_bytes_are_those_of_the_projects_own_generation(name, tmp_path):
    config = few_layers(name, layers=1)
    path = str(write_base(tmp_path, config))
    model, tokenizer = load(path)
    model.set_dtype(mx.bfloat16)
    found = calculate(path, SizingConfig((1, 300), (1,), dtype="bfloat16"))
    for row in found.rows:
        assert (row.positions, row.kv_bytes) == measured(model, tokenizer, row.length)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    config = qwen2_config(hidden_size=128, eos_token_id=list(range(700)))
    return write_base(tmp_path_factory.mktemp("base") / "base", config)


OPTIONS = (
    {},
    {"max_kv_size": 500},
    {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 2048},
    {"kv_bits": 4, "quantized_kv_start": 100},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_every_kind_of_kv_cache_is_sized_as_generation_fills_it(base, k, options, tmp_path):
    model, _ = load(str(base))
    save_adapter(random_adapter(model, k), tmp_path / "a")
    model, tokenizer = load(str(base), tmp_path / "a")
    config = SizingConfig((5, 101, 2048, 2050), (k,), **options)
    sizes = [row for row in calculate(str(base), config).rows if row.k == k]
    for row in sizes:
        assert (row.positions, row.kv_bytes) == measured(model, tokenizer, row.length, **options)


GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 128,
    "sliding_window_pattern": 3,
    "num_hidden_layers": 7,
}


def test_layers_with_a_sliding_window_hold_no_more_than_it(tmp_path):
    path = str(write_base(tmp_path, qwen2_config(**GEMMA3)))
    model, tokenizer = load(path)
    rows = calculate(path, SizingConfig((100, 2100), (1,))).rows
    for row in rows:
        assert (row.positions, row.kv_bytes) == measured(model, tokenizer, row.length)
    one = 2 * 2 * 64 * 4  # keys and values of 2 heads, float32
    assert rows[1].kv_bytes == (5 * 128 + 2 * 2100) * one


def test_the_calculator_says_what_bench_measures(base):
    lengths = (7, 300)
    sides = benchmark.load_sides(str(base), {2: None, 4: None}, lengths)
    config = BenchmarkConfig(lengths, 1, 1, 2048, 0, 0)
    rows = benchmark.measure(sides, config)
    found = calculate(str(base), SizingConfig(lengths, (2, 4)))
    assert [(row.length, row.k, row.positions, row.kv_bytes) for row in found.rows] == [
        (row.length, row.k, row.positions, row.figures.kv_bytes) for row in rows
    ]
    encoders = [side.embedding.encoder for side in sides if side.embedding is not None]
    assert [factor.encoder_bytes for factor in found.factors[1:]] == [
        sum(array.nbytes for _, array in tree_flatten(e.parameters())) for e in encoders
    ]


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_positions_are_what_compress_gives(base, k, tmp_path):
    model, _ = load(str(base))
    save_adapter(random_adapter(model, k), tmp_path / "a")
    model, _ = load(str(base), tmp_path / "a")
    embedding, lengths = merged_embedding(model), (1, k - 1, k, k + 1, 1000)
    rows = calculate(str(base), SizingConfig(tuple(lengths), (k,))).rows
    for row in rows:
        if row.k == k:
            ids = embedding.compress([Segment(list(range(5, 6)) * row.length)]).ids
            assert row.positions == len(ids)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"quantization": True}])
def test_the_config_alone_gives_the_sizes_of_the_weights_files(changes, tmp_path):
    if "quantization" in changes:
        changes = {"quantization": {"group_size": 32, "bits": 4}}
    path = write_base(tmp_path / "base", qwen2_config(torch_dtype="float32", **changes))
    asked = SizingConfig((100, 1000), KS, usable_bytes=1 << 24)
    full = calculate(str(path), asked)
    stored = mx.load(str(path / "model.safetensors")).values()
    assert full.base.weight_bytes == sum(array.nbytes for array in stored)
    (path / "model.safetensors").unlink()
    alone = calculate(str(path), asked)
    assert (full.base.has_weights, alone.base.has_weights) == (True, False)
    assert (alone.rows, alone.factors) == (full.rows, full.factors)
    assert alone.base.parameters == full.base.parameters


def test_a_folder_that_lacks_one_of_its_weights_files_counts_by_its_config(tmp_path):
    path = write_base(tmp_path / "base", qwen2_config(torch_dtype="bfloat16"))
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = calculate(str(path), SizingConfig((10,), KS)).base
    assert (found.has_weights, found.dtype) == (False, "bfloat16")


def test_the_longest_prompt_is_the_last_that_fits(tmp_path):
    path = folder_of(tmp_path, config_of("qwen2.5-0.5b") | {"max_position_embeddings": 1 << 20})
    usable = 2 << 30
    found = calculate(path, SizingConfig((1,), KS, usable_bytes=usable))
    for factor in found.factors:
        assert factor.limited_by == MEMORY
        longest = factor.longest_prompt
        rows = calculate(path, SizingConfig((longest, longest + 1), KS, usable_bytes=usable)).rows
        fits = {row.length: row.fits for row in rows if row.k == factor.k}
        assert fits == {longest: True, longest + 1: False}


def test_the_longest_prompt_ends_at_the_context_or_at_the_block_table(tmp_path):
    ends = []
    for context in (32_768, 1 << 20, None):
        config = qwen2_config(max_position_embeddings=context, dtype="float16")
        path = folder_of(tmp_path, config)
        found = calculate(path, SizingConfig((1,), (4,), usable_bytes=1 << 50))
        ends.append([(factor.longest_prompt, factor.limited_by) for factor in found.factors])
    assert ends == [
        [(32_768, "context"), (131_072, "context")],
        [(1 << 20, "context"), (4 * 131_072, "block table")],
        [(None, None), (4 * 131_072, "block table")],
    ]


def test_nothing_fits_where_the_weights_do_not(tmp_path):
    path = folder_of(tmp_path, config_of("qwen2.5-7b"))
    found = calculate(path, SizingConfig((1,), (1, 4), usable_bytes=8 << 30))
    assert [(f.longest_prompt, f.limited_by) for f in found.factors] == [(0, MEMORY)] * 2
    assert [row.fits for row in found.rows] == [False, False]


def test_memory_is_weights_encoder_merged_blocks_and_all_the_room_of_the_cache(tmp_path):
    config = config_of("qwen2.5-0.5b")
    (one, four) = calculate(folder_of(tmp_path, config), SizingConfig((1200,), (4,))).rows
    weights, room = 2 * PARAMETERS["qwen2.5-0.5b"], position_bytes(config)
    # mlx-lm makes room by 256 positions.
    assert one.memory_bytes == weights + 1280 * room
    blocks = 300 * 896 * 2
    assert four.memory_bytes == weights + 41_756_288 * 4 + blocks + 512 * room


def documented_speedups() -> dict[tuple[int, int], float]:
    """The lowest speed-up of every row of the table in docs/performance.md, by length and K."""
    text = (Path(__file__).parents[2] / "docs/performance.md").read_text()
    table = text.split("## Speed and memory")[1].split("##")[0]
    found, length = {}, 0
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 10 and cells[1].isdigit():
            length = int(cells[0].removesuffix(" tokens").replace(",", "")) if cells[0] else length
            if cells[1] != "1":
                lowest = re.search(r"\(([\d.]+)-", cells[4])
                found[length, int(cells[1])] = float(lowest[1])
    return found


def test_the_floor_is_below_every_speedup_that_was_measured(tmp_path):
    lowest = documented_speedups()
    assert len(lowest) == 6
    path = folder_of(tmp_path, config_of("qwen2.5-0.5b"))
    rows = calculate(path, SizingConfig((512, 2048), (2, 4, 8), dtype="float32")).rows
    floors = {(row.length, row.k): row.speedup_floor for row in rows if row.k > 1}
    assert floors.keys() == lowest.keys()
    assert all(floors[key] < lowest[key] for key in floors)


def test_the_floor_nears_the_ratio_of_multiplications_as_prompts_grow(tmp_path):
    path = folder_of(tmp_path, config_of("qwen2.5-7b"))
    rows = [r for r in calculate(path, SizingConfig((512, 8192, 131_072), (4,))).rows if r.k == 4]
    shares = [row.speedup_floor / row.work_ratio for row in rows]
    assert shares == sorted(shares)
    assert shares[0] < 0.6 < 0.9 < shares[2] < 1


def test_the_prefill_steps_are_mlx_lms():
    for positions in (1, 2, 2048, 2049, 2050, 5000):
        sizes = list(steps(positions, 2048))
        assert sum(sizes) == positions
        assert sizes[-1] == 1
        assert all(size == 2048 for size in sizes[:-2])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch_dtype": None}, "does not say its dtype: give --dtype"),
        ({"torch_dtype": "int8"}, "says dtype 'int8'"),
        ({"model_type": "nope"}, "nope not supported"),
        ({"model_file": "x.py"}, "Python files of its own"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
        ({"hidden_size": 0}, "cannot build"),
        ({"num_attention_heads": 0}, "cannot build"),
        ({"num_hidden_layers": 0}, "cannot be traced"),
        ({"hidden_size": 10**12}, "cannot build"),
    ],
)
def test_a_config_that_does_not_say_enough_is_refused_by_name(tmp_path, changes, said):
    path = folder_of(tmp_path, config_of("qwen2.5-0.5b") | {"num_hidden_layers": 1} | changes)
    with pytest.raises(ModelError, match=re.escape(said)):
        calculate(path, SizingConfig((10,), KS))


def test_a_cache_that_mlx_lm_cannot_quantize_is_refused(tmp_path):
    path = folder_of(tmp_path, qwen2_config(**GEMMA3, torch_dtype="float16"))
    asked = SizingConfig((10,), KS, kv_bits=4, quantized_kv_start=0)
    with pytest.raises(ModelError, match=r"cannot quantize the KV cache of .*--kv-bits"):
        calculate(path, asked)
