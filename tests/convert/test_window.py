"""From an LCLM checkpoint to a folder: what is refused, what is written, and what a kill leaves."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kmerge_mlx import load
from kmerge_mlx.convert.window import Packing, convert_window, find_window
from kmerge_mlx.errors import AdapterError, CheckpointError, ModelError
from kmerge_mlx.model import merged_embedding
from tests.cli_runner import run
from tests.damage import damaged, peak_bytes
from tests.test_window_encoder import AUTHORS


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the authors' checkpoint, to be changed."""
    return Path(shutil.copytree(AUTHORS / "checkpoint", tmp_path / "checkpoint"))


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, **changes: np.ndarray | None) -> None:
    tensors = load_file(path) | {name.replace("__", "."): a for name, a in changes.items()}
    save_file({name: a for name, a in tensors.items() if a is not None}, path)


def refused(checkpoint: Path, **options: object) -> str:
    made = checkpoint.parent / "made"
    with pytest.raises((CheckpointError, AdapterError)) as caught:
        convert_window(checkpoint, "it", made, **options)
    assert not made.exists()
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["checkpoint"]
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pooling": "eos"}, "pooling is 'eos', expected mean or concat"),
        ({"encoder_mask_type": "bidirectional"}, "encoder_mask_type is 'bidirectional', expected"),
        ({"adapter_type": "attention"}, "adapter_type is 'attention', expected mlp"),
        ({"compression_ratio": "4"}, "compression_ratio is '4', expected a whole number"),
        ({"compression_ratio": 1}, "merge_factor is 1, expected a whole number of at least 2"),
        ({"encoder_window_size": 18}, "window is 18, expected a multiple of merge_factor 4"),
        ({"encoder_window_size": -16}, "encoder_window_size is -16, expected a whole number"),
        ({"encoder_window_size": 2**40}, "windows of 1,099,511,627,776 tokens and 0 before them"),
        ({"boundary_overlap": 2**40}, "windows of 16 tokens and 1,099,511,627,776 before them"),
    ],
)
def test_what_a_checkpoint_cannot_be_is_refused_by_name(checkpoint, changes, said):
    change_json(checkpoint / "model_config.json", **changes)
    assert said in refused(checkpoint)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_part_that_is_no_language_model_is_one_line(checkpoint, name):
    part = checkpoint / name
    change_json(part / "config.json", model_file="evil.py")
    assert f"{part} brings a `model_file` of its own" in refused(checkpoint)
    change_json(part / "config.json", model_file=None, num_hidden_layers=10**6)
    assert "num_hidden_layers is 1000000, expected up to 1024" in refused(checkpoint)
    weights = part / "model.safetensors"
    weights.unlink()
    assert refused(checkpoint).count("\n") == 0
    weights.symlink_to("/dev/zero")
    change_json(part / "config.json", num_hidden_layers=3)
    assert f"cannot read {weights}: it is not a file" in refused(checkpoint)
    (part / "config.json").unlink()
    said = refused(checkpoint)
    assert f"{part} holds no config.json with model*.safetensors" in said
    shutil.rmtree(part)
    assert f"{part} holds no config.json with model*.safetensors" in refused(checkpoint)


@pytest.mark.parametrize("text", ["[1, 2]", "null", "", "[" * 100_000, '{"pooling": ["mean"]}'])
def test_settings_that_are_no_object_of_numbers_are_refused(checkpoint, text):
    (checkpoint / "model_config.json").write_text(text)
    assert "model_config.json" in refused(checkpoint)


@pytest.mark.parametrize(("name", "tensor"), [("encoder", "norm"), ("decoder", "model.norm")])
def test_weights_that_are_no_numbers_are_refused(checkpoint, name, tensor):
    for value in (np.nan, np.inf, -np.inf):
        path = checkpoint / name / "model.safetensors"
        weight = load_file(path)[f"{tensor}.weight"]
        weight[-1] = value
        change_tensors(path, **{f"{tensor}.weight": weight})
        assert f"{name}: model.norm.weight holds NaN or infinite values" in refused(checkpoint)


def test_tokens_past_the_table_and_odd_entries_of_a_tokenizer_are_told(checkpoint):
    path = checkpoint / "decoder" / "tokenizer.json"
    good = path.read_text()
    added = json.loads(good)["added_tokens"]
    change_json(path, added_tokens=[*added, 7, "<|memory_end|>"])
    made = checkpoint.parent / "made"
    with suppress(AdapterError, CheckpointError, ModelError):  # no other error
        convert_window(checkpoint, "it", made)
    shutil.rmtree(made, ignore_errors=True)
    far = [t | {"id": 10**6} if t["content"] == "<|memory_end|>" else t for t in added]
    change_json(path, added_tokens=far)
    said = "numbers <|memory_end|> 1,000,000, but the table has 703 rows"
    assert said in refused(checkpoint)


def test_windows_that_the_encoder_was_not_made_for_are_not_loaded(checkpoint):
    """Whoever made the folder: a window is read at once, however long."""
    made = checkpoint.parent / "made"
    convert_window(checkpoint, "it", made)
    path = made / "kmerge" / "merge_config.json"
    entry = json.loads(path.read_text())["window_encoder"]
    change_json(path, window_encoder=entry | {"window": 2**40})
    with pytest.raises(AdapterError, match=r"its config\.json allows 4,096"):
        load(str(made), made)


def test_everything_wrong_is_listed_at_once(checkpoint):
    change_json(checkpoint / "model_config.json", pooling="eos", adapter_type="none")
    tokenizer = json.loads((checkpoint / "decoder" / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < 700]
    (checkpoint / "decoder" / "tokenizer.json").write_text(json.dumps(tokenizer))
    extra = np.zeros((3, 3), np.float32)
    change_tensors(checkpoint / "encoder" / "model.safetensors", norm__weight=None, more=extra)
    down = {"model__layers__1__mlp__down_proj__weight": extra}
    change_tensors(checkpoint / "decoder" / "model.safetensors", **down)
    said = refused(checkpoint)
    for problem in (
        "pooling is 'eos'",
        "adapter_type is 'none'",
        "has no token <|memory_start|>, <|memory_end|>",
        "encoder: model.norm.weight is missing, expected shape (48,)",
        "encoder: model.more (3, 3) belongs to nothing here",
        "decoder: model.layers.1.mlp.down_proj.weight has shape (3, 3), expected (64, 128)",
    ):
        assert problem in said


def test_a_projection_of_other_sizes_or_without_numbers_is_refused(checkpoint):
    path = checkpoint / "adapter" / "adapter.safetensors"
    change_tensors(path, fc2__weight=np.zeros((32, 64), np.float32))
    assert "fc2.weight has shape (32, 64), expected (64, 64)" in refused(checkpoint)
    change_tensors(path, fc2__weight=np.full((64, 64), np.nan, np.float32))
    assert "fc2.weight holds NaN" in refused(checkpoint)


def test_tokenizers_that_number_tokens_differently_are_refused(checkpoint):
    path = checkpoint / "encoder" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = (next(t for t, i in vocabulary.items() if i == n) for n in (40, 41))
    vocabulary[a], vocabulary[b] = 41, 40
    path.write_text(json.dumps(tokenizer))
    assert "another id than the decoder's (2 such tokens)" in refused(checkpoint)


def test_options_that_mean_nothing_here_are_refused(checkpoint):
    assert "compression_ratio is 4, but `k` is 8" in refused(checkpoint, k=8)
    assert "`model` is for a LoRA" in refused(checkpoint, model="a/b")
    said = refused(checkpoint, packing=Packing(encoder_bits=4, group_size=128))
    assert "no layer in encoder has rows that groups of 128 divide" in said


@pytest.mark.parametrize("part", ["decoder", "encoder", "adapter"])
def test_torn_and_damaged_weights_are_one_error_each(checkpoint, part):
    draw = random.Random(0)
    (path,) = (checkpoint / part).glob("*.safetensors")
    good, made = path.read_bytes(), checkpoint.parent / "made"
    before = peak_bytes()
    for number in range(30):
        path.write_bytes(good[: len(good) // 2] if number == 0 else damaged(good, draw, 2000))
        with suppress(CheckpointError, AdapterError):  # no other error
            convert_window(checkpoint, "it", made, force=True)
        shutil.rmtree(made, ignore_errors=True)
    assert peak_bytes() - before < 400 << 20


def test_the_newest_step_counts_and_the_settings_may_lie_above_it(checkpoint):
    root = checkpoint.parent / "run"
    for step in (900, 1000):
        shutil.copytree(checkpoint, root / f"checkpoint_{step}")
    (root / "checkpoint_1000" / "model_config.json").rename(root / "model_config.json")
    change_json(root / "checkpoint_900" / "model_config.json", pooling="eos")
    assert find_window(str(root)) == root
    assert convert_window(root, "it", checkpoint.parent / "made").merge_factor == 4


def test_weights_can_be_cast_and_packed_on_the_way(tmp_path):
    from tests.reference import lclm

    checkpoint = lclm.make(tmp_path / "checkpoint", lclm.Sizes(4, 16, encoder_width=64))
    convert_window(checkpoint, "it", tmp_path / "float32")
    packing = Packing(bits=8, encoder_bits=8)
    convert_window(checkpoint, "it", tmp_path / "packed", dtype="bfloat16", packing=packing)
    sizes = [
        sum(p.stat().st_size for p in (tmp_path / name).rglob("model*.safetensors"))
        for name in ("float32", "packed")
    ]
    assert sizes[1] < sizes[0] / 3
    rows = []
    for name in ("float32", "packed"):
        model, _ = load(str(tmp_path / name), tmp_path / name)
        embedding = merged_embedding(model)
        keys = embedding.keys([*range(3, 40)])
        given = embedding.embedding, [([*range(3, 40)], keys)]
        assert not list(embedding.encoder.merge(*given, ["nothing"]))
        (_, merged), *_ = embedding.encoder.merge(*given, keys)
        rows.append(np.array(merged.astype(mx.float32)))
    gap = np.linalg.norm(rows[0] - rows[1], axis=1) / np.linalg.norm(rows[0], axis=1)
    assert gap.max() < 0.1


def test_only_what_an_earlier_run_wrote_is_replaced(checkpoint):
    made = checkpoint.parent / "made"
    convert_window(checkpoint, "it", made)
    with pytest.raises(AdapterError, match="exists"):
        convert_window(checkpoint, "it", made)
    convert_window(checkpoint, "it", made, force=True)
    (made / "kmerge" / "mine.md").write_text("mine")
    with pytest.raises(AdapterError, match=r"mine\.md"):
        convert_window(checkpoint, "it", made, force=True)


def test_the_command_says_what_it_made_and_where(checkpoint, tmp_path):
    made = tmp_path / "lclm"
    done = run("convert", checkpoint, made)
    assert done.code == 0, done.err
    assert "K = 4, windows of 16 tokens, mean of 4, D = 64, base in the folder" in done.err
    (tmp_path / "text.txt").write_text("AA\n+AB\n" * 20)
    command = ("generate", "--adapter-path", made, tmp_path / "text.txt", "-p", "Who?", "-m", "4")
    done = run(*command)
    assert done.code == 0, done.err
    assert "merged" in done.err
    done = run("convert", tmp_path, tmp_path / "nothing")
    assert done.code == 1
    assert "holds no encoder.pth" in done.err
    assert not (tmp_path / "nothing").exists()
