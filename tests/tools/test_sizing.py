"""The calculator against what is measured, published, and counted by hand.

Oracles: the caches of mlx-lm's own models after this project's generation; sizes that the models'
makers publish; counts by hand from a config; docs/performance.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from kmerge_mlx import Segment, load, stream_generate
from kmerge_mlx.adapters.folder import save_adapter
from kmerge_mlx.errors import ModelError
from kmerge_mlx.tools.sizing import MEMORY, SizingConfig, calculate
from tests.tiny import EXPERTS, qwen2_config, random_adapter, write_base

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
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 64, "query_pre_attn_scalar": 64}
GEMMA3 |= {"sliding_window": 128, "sliding_window_pattern": 3, "num_hidden_layers": 7}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "head_dim": 32}
LINEAR |= {"num_hidden_layers": 8}
QWEN3_NEXT = EXPERTS | LINEAR | {"model_type": "qwen3_next", "shared_expert_intermediate_size": 32}
QWEN3_NEXT |= {"partial_rotary_factor": 0.25, "full_attention_interval": 4}
HYBRIDS = {"qwen3_5": LINEAR | {"model_type": "qwen3_5"}, "qwen3_next": QWEN3_NEXT}
BASES = {
    "qwen2": {"eos_token_id": list(range(700)), "hidden_size": 128},
    "gemma3_text": GEMMA3,
    "qwen3_moe": EXPERTS,
} | HYBRIDS


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
def test_the_config_gives_the_published_sizes_and_takes_no_memory(name, tmp_path):
    config = config_of(name)
    lengths = (1, 100, 2049, 30_001)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = calculate(folder_of(tmp_path, config), SizingConfig(lengths, KS))
    assert mx.get_peak_memory() - before < 1 << 20
    assert found["base"]["parameters"] == PARAMETERS[name]
    assert found["base"]["weight_bytes"] == 2 * PARAMETERS[name]
    assert found["base"]["context_length"] == config["max_position_embeddings"]
    assert [(row["length"], row["k"]) for row in found["rows"]] == [
        (n, k) for n in lengths for k in KS
    ]
    for row in found["rows"]:
        assert row["kv_bytes"] == row["positions"] * position_bytes(config)


def held(cache: list) -> int:
    """Bytes that a cache holds, from MLX's own arrays."""
    found = [e.keys_and_values() if hasattr(e, "keys_and_values") else e.cache for e in cache]
    return sum(array.nbytes for _, array in tree_flatten(found))


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


@pytest.mark.parametrize("name", BASES)
def test_positions_and_bytes_are_those_of_the_projects_own_generation(name, tmp_path):
    path = str(write_base(tmp_path, qwen2_config(**BASES[name])))
    model, tokenizer = load(path)
    lengths = (3, 60) if name in HYBRIDS else (3, 100, 300)
    found = calculate(path, SizingConfig(lengths, (1,)))
    for row in found["rows"]:
        assert (row["positions"], row["kv_bytes"]) == measured(model, tokenizer, row["length"])
    parameters = [array for _, array in tree_flatten(model.parameters())]
    # mlx-lm's count leaves out the few numbers that are in no layer of a kind of their own.
    assert found["base"]["parameters"] == pytest.approx(sum(a.size for a in parameters), rel=1e-3)
    assert found["base"]["weight_bytes"] == sum(array.nbytes for array in parameters)


def test_a_published_hybrid_of_80_billion_parameters_is_calculated(tmp_path):
    path = folder_of(tmp_path, config_of("qwen3-next-80b-a3b-4bit"))
    found = calculate(path, SizingConfig((1000,), (1,)))
    assert found["base"]["parameters"] == pytest.approx(79.7e9, rel=1e-3)
    linear = 36 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)
    (row,) = found["rows"]
    assert row["kv_bytes"] == linear + 12 * 2 * 2 * 256 * 2 * 1000


@pytest.mark.slow
def test_every_kind_of_kv_cache_is_sized_as_generation_fills_it(tmp_path):
    base = str(write_base(tmp_path / "base", qwen2_config(**BASES["qwen2"])))
    save_adapter(random_adapter(load(base)[0], 3), tmp_path / "a")
    model, tokenizer = load(base, tmp_path / "a")
    for options in (
        {"max_kv_size": 500},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 2048},
        {"kv_bits": 4, "quantized_kv_start": 100},
    ):
        for row in calculate(base, SizingConfig((5, 101, 2048, 6150), (3,), **options))["rows"]:
            if row["k"] == 3:
                wanted = measured(model, tokenizer, row["length"], **options)
                assert (row["positions"], row["kv_bytes"]) == wanted


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": False}, {"quantization": {"group_size": 32, "bits": 4}}],
    ids=str,
)
def test_the_config_alone_gives_the_sizes_of_the_weights_files(changes, tmp_path):
    path = write_base(tmp_path / "base", qwen2_config(torch_dtype="float32", **changes))
    asked = SizingConfig((100, 1000), KS, usable_bytes=1 << 24)
    full = calculate(str(path), asked)
    stored = mx.load(str(path / "model.safetensors")).values()
    assert full["base"]["weight_bytes"] == sum(array.nbytes for array in stored)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    alone = calculate(str(path), asked)
    assert (full["base"]["has_weights"], alone["base"]["has_weights"]) == (True, False)
    assert (alone["rows"], alone["factors"]) == (full["rows"], full["factors"])
    assert alone["base"]["parameters"] == full["base"]["parameters"]


def test_the_longest_prompt_is_the_last_that_fits(tmp_path):
    path = folder_of(tmp_path, config_of("qwen2.5-0.5b") | {"max_position_embeddings": 1 << 20})
    for factor in calculate(path, SizingConfig((1,), KS, usable_bytes=2 << 30))["factors"]:
        longest, asked = factor["longest_prompt"], (factor["k"],)
        both = SizingConfig((longest, longest + 1), asked, usable_bytes=2 << 30)
        rows = [row for row in calculate(path, both)["rows"] if row["k"] == factor["k"]]
        assert [row["fits"] for row in rows] == [True, False]
        assert factor["limited_by"] == MEMORY
    nothing = calculate(path, SizingConfig((1,), (1, 4), usable_bytes=1 << 20))
    assert [(f["longest_prompt"], f["limited_by"]) for f in nothing["factors"]] == [(0, MEMORY)] * 2


def test_memory_is_weights_encoder_merged_blocks_and_all_the_room_of_the_cache(tmp_path):
    config = config_of("qwen2.5-0.5b")
    one, four = calculate(folder_of(tmp_path, config), SizingConfig((1200,), (4,)))["rows"]
    weights, room = 2 * PARAMETERS["qwen2.5-0.5b"], position_bytes(config)
    # mlx-lm makes room by 256 positions.
    assert one["memory_bytes"] == weights + 1280 * room
    blocks = 300 * 896 * 2
    assert four["memory_bytes"] == weights + 41_756_288 * 4 + blocks + 512 * room


D, INNER, HEADS, KV_HEADS, VOCAB = 64, 128, 4, 2, 700
KV = D * KV_HEADS // HEADS
LAYER = 2 * D * D + 2 * D * KV + 3 * D * INNER


def by_hand(positions: int, windows: list[int | None], layer: int = LAYER) -> int:
    """All multiplications of a prefill, pair by pair."""
    total = 0
    for number, window in enumerate(windows):
        is_last_layer = number + 1 == len(windows)
        for query in range(positions):
            keys = min(query + 1, window or positions)
            if not is_last_layer or query == positions - 1:
                total += layer + 2 * D * keys  # scores and their weighted sum
            else:  # nobody asks for the last layer's output when only the cache is filled
                total += 2 * D * KV
    return total + D * VOCAB


def three_layers(**changes) -> dict:
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return qwen2_config(num_hidden_layers=3, **heads) | changes


@pytest.mark.parametrize("quantization", [{}, {"quantization": {"group_size": 32, "bits": 4}}])
def test_reading_a_prompt_is_counted_pair_by_pair(tmp_path, quantization):
    path = str(write_base(tmp_path, three_layers(**quantization)))
    encoder = 4 * D * (6 * D) * 2 + 4 * D * D  # K = 4: W1 and W2 of 6D x 4D, W3 of D x 4D
    one, four = calculate(path, SizingConfig((99,), (4,)))["rows"]
    assert one["multiplications"] == by_hand(99, [None] * 3)
    assert four["multiplications"] == by_hand(25, [None] * 3) + 25 * encoder
    assert four["work_ratio"] == one["multiplications"] / four["multiplications"]
    if not quantization:
        biases, steps = D + 2 * KV, 1
        last = 3 * (LAYER + biases) + D * VOCAB
        fill = 2 * (LAYER + biases) + 2 * (D + 1) * KV
        assert one["weight_traffic_bytes"] == 4 * (last + steps * fill)


def test_windows_and_experts_are_where_work_ends(tmp_path):
    gemma = {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16}
    window = {"sliding_window": 8, "sliding_window_pattern": 3}
    layer = 2 * D * D + 2 * D * KV + 8 * D + 2 * 3 * D * 32  # a gate, and 2 of 8 experts
    for name, changes, wanted in (
        ("gemma", gemma | window, by_hand(50, [8, 8, None])),
        ("moe", EXPERTS | {"head_dim": 16}, by_hand(50, [None] * 3, layer)),
    ):
        path = str(write_base(tmp_path / name, three_layers(**changes)))
        (row,) = calculate(path, SizingConfig((50,), (1,)))["rows"]
        assert row["multiplications"] == wanted


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
    rows = calculate(path, SizingConfig((512, 2048), (2, 4, 8), dtype="float32"))["rows"]
    floors = {(row["length"], row["k"]): row["speedup_floor"] for row in rows if row["k"] > 1}
    assert floors.keys() == lowest.keys()
    assert all(floors[key] < lowest[key] for key in floors)


def test_a_config_that_does_not_say_enough_is_refused_by_name(tmp_path):
    for changes, said in (
        ({"torch_dtype": None}, "dtype None: give `dtype`"),
        ({"torch_dtype": ["float32"]}, "dtype ['float32']"),
        ({"model_type": "nope"}, "nope not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number above 0"),
        ({"hidden_size": 10**12}, "cannot build"),
    ):
        path = folder_of(tmp_path, config_of("qwen2.5-0.5b") | {"num_hidden_layers": 1} | changes)
        with pytest.raises(ModelError, match=re.escape(said)):
            calculate(path, SizingConfig((10,), KS))


def test_a_cache_that_mlx_lm_cannot_quantize_is_refused(tmp_path):
    path = folder_of(tmp_path, qwen2_config(**GEMMA3, torch_dtype="float16"))
    with pytest.raises(ModelError, match=r"cannot quantize the KV cache of .*`kv_bits`"):
        calculate(path, SizingConfig((10,), KS, kv_bits=4, quantized_kv_start=0))
