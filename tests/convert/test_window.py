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
from tests.cli_runner import assert_one_error, run
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
        ({"compression_ratio": 1}, "compression_ratio is 1, expected a whole number from 2"),
        ({"compression_ratio": -4}, "compression_ratio is -4, expected a whole number from 2"),
        ({"encoder_window_size": 18}, "window is 18, expected a multiple of merge_factor 4"),
        ({"encoder_window_size": -16}, "window_size is -16, expected a whole number from 1"),
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


def test_settings_that_are_missing_are_called_so(checkpoint):
    (checkpoint / "model_config.json").write_text('{"encoder_mask_type": "causal"}')
    said = refused(checkpoint)
    for name in ("pooling", "adapter_type", "compression_ratio", "encoder_window_size"):
        assert f"{name} is missing, expected" in said
    assert "boundary_overlap" not in said


def test_an_encoder_of_another_architecture_is_refused_in_words(checkpoint):
    change_json(checkpoint / "encoder" / "config.json", model_type="mamba")
    said = refused(checkpoint)
    assert f"cannot read {checkpoint / 'encoder'}: its config lacks 'state_size', 'conv_k" in said
    assert "__init__" not in said


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("decoder", "generation_config.json"),
        ("decoder", "tokenizer_config.json"),
        ("encoder", "tokenizer_config.json"),
        ("encoder", "tokenizer.json"),
    ],
)
def test_torn_texts_are_listed_with_all_else_and_nothing_is_written(checkpoint, part, name):
    path = checkpoint / part / name
    text = path.read_text() if path.exists() else '{"eos_token_id": [1, 2, 3]}'
    path.write_text(text[:20])
    assert refused(checkpoint).startswith(f"it cannot be converted: {path} is not valid JSON (")
    change_json(checkpoint / "model_config.json", pooling="eos")
    said = refused(checkpoint)
    assert "2 problems" in said
    assert "pooling is 'eos'" in said


@pytest.mark.parametrize("part", [".", "kmerge/encoder"])
def test_a_folder_without_one_of_its_tokenizers_is_not_loaded(checkpoint, tmp_path, part):
    made = checkpoint.parent / "made"
    convert_window(checkpoint, "it", made)
    (made / part / "tokenizer.json").unlink()
    (tmp_path / "text.txt").write_text("AA\n+AB\n" * 20)
    done = run("generate", "--adapter-path", made, tmp_path / "text.txt", "-p", "Who?")
    assert_one_error(done, 1, "knows no text", f"{made / part} lacks tokenizer.json")


def test_a_lora_of_a_decoder_is_not_packed(tmp_path):
    from tests.reference import lclm

    checkpoint = lclm.make(tmp_path / "checkpoint", lclm.Sizes(4, 16, lora=True))
    with pytest.raises(CheckpointError, match=r"`q_bits` packs a whole decoder, .* a LoRA"):
        convert_window(checkpoint, "it", tmp_path / "made", packing=Packing(bits=4))
    assert not (tmp_path / "made").exists()
    convert_window(checkpoint, "it", tmp_path / "made", packing=Packing(encoder_bits=4))


def test_matrices_that_are_not_packed_are_counted(checkpoint, tmp_path):
    done = run("convert", checkpoint, tmp_path / "made", "--encoder-bits", 4)
    assert done.code == 0, done.err
    weights = load_file(checkpoint / "encoder" / "model.safetensors").values()
    matrices = [array for array in weights if array.ndim == 2]
    left = sum(array.shape[1] % 64 != 0 for array in matrices)
    assert 0 < left < len(matrices)
    said = f"note: {left} of the encoder's {len(matrices)} matrices are not packed: groups of 64 do"
    assert said in " ".join(done.err.split())
    packed = load_file(tmp_path / "made/kmerge/encoder/model-00001-of-00001.safetensors")
    assert sum(name.endswith(".scales") for name in packed) == len(matrices) - left
    done = run("convert", checkpoint, tmp_path / "other", "--q-group-size", 32)
    assert_one_error(
        done, 2, "--q-group-size is of packed weights: give --q-bits or --encoder-bits"
    )


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
    assert "fewer than K" not in done.err
    (tmp_path / "text.txt").write_text("A")
    done = run(*command)
    assert "\nPrompt: " in done.err, done.err
    assert "1 merged and " in done.err
    assert "fewer than K" not in done.err  # nothing is padded
    for folder in (tmp_path, checkpoint / "decoder"):
        done = run("convert", folder, tmp_path / "nothing")
        assert_one_error(done, 1, "holds no encoder.pth", "K-Token-Merging", "LCLM's (model_config")
    assert not (tmp_path / "nothing").exists()


def test_other_commands_name_a_checkpoint_of_lclm(checkpoint, tmp_path):
    said = f"is a checkpoint of LCLM: run `kmerge-mlx convert {checkpoint} DST` first"
    assert_one_error(run("info", checkpoint), 1, said)
    assert_one_error(run("generate", "--adapter-path", checkpoint, "-p", "A"), 1, said)
    steps = tmp_path / "run"
    shutil.copytree(checkpoint, steps / "checkpoint_10")
    assert_one_error(run("info", steps), 1, f"{steps} is a checkpoint of LCLM")


def test_the_calculator_takes_the_folders_own_k(checkpoint):
    made = checkpoint.parent / "made"
    convert_window(checkpoint, "it", made)
    for more, ks in (((), [1, 4]), (("--k", 2), [1, 2])):
        found = json.loads(run("info", "--model", made, "--length", 100, *more, "--json").out)
        assert [row["k"] for row in found["rows"]] == found["settings"]["ks"] == ks


def test_train_says_first_that_a_window_encoder_is_not_trained(checkpoint, tmp_path):
    made = checkpoint.parent / "made"
    convert_window(checkpoint, "it", made)
    done = run(
        "train", "--model", made, "--data", tmp_path / "no", "--adapter-path", tmp_path / "a"
    )
    said = f"note: the window encoder that {made} carries is not trained: a new one of K-Token"
    assert " ".join(done.err.split()).startswith(said)
    assert done.code == 1


def test_a_trained_decoder_is_not_called_untrained(checkpoint, tmp_path):
    made = checkpoint.parent / "made"
    convert_window(checkpoint, "it", made)
    row = json.dumps({"context": "AA\n+AB\n" * 9, "prompt": "A?", "completion": "B"})
    (tmp_path / "test.jsonl").write_text(f"{row}\n" * 2)
    asked = ("evaluate", "--model", made, "--data", tmp_path, "--timed", 0, "--baseline")
    for more in (("uncompressed",), ("base",), ("base", "--baseline", "uncompressed")):
        table = run(*asked, *more).out
        assert [line.split("  ")[0] for line in table.splitlines()[2:]] == ["model alone", "K=4"]
