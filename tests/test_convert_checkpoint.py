"""A whole checkpoint folder to an adapter folder: found, read, checked, written.

Checkpoints are made by hand (``tests.checkpoints``), so the expected bits are numpy's; that the
hand-made files are what torch writes, torch says. What loads the result beside us is mlx-lm.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from kmerge_mlx import load
from kmerge_mlx.adapter import FILES, load_adapter
from kmerge_mlx.convert.checkpoint import convert_checkpoint, find_checkpoint
from kmerge_mlx.errors import AdapterError, CheckpointError, ModelError
from kmerge_mlx.model import merged_embedding
from tests.checkpoints import PREFIX, Checkpoint, make, torch_file
from tests.tiny import PAD, build, qwen2_config, write_base

NAMES = {"net.0": "encoder.w1", "net.2": "encoder.w2", "net.4": "encoder.w3"}


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("tied"), qwen2_config())


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    config = qwen2_config(tie_word_embeddings=False)
    return write_base(tmp_path_factory.mktemp("untied"), config)


def convert(tmp_path: Path, checkpoint: Checkpoint, bin_file: bool = False, **options) -> Path:
    source = checkpoint.write(tmp_path / "src", bin_file)
    convert_checkpoint(str(source), tmp_path / "dst", **options)
    return tmp_path / "dst"


def refused(tmp_path: Path, checkpoint: Checkpoint | Path, kind=CheckpointError, **options) -> str:
    """The message of a conversion that must fail, and leave nothing."""
    source = (
        checkpoint.write(tmp_path / "src") if isinstance(checkpoint, Checkpoint) else checkpoint
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as caught:
        convert_checkpoint(str(source), tmp_path / "dst", **options)
    assert sorted(tmp_path.rglob("*")) == before
    text = str(caught.value)
    assert text.splitlines()[0].isprintable()
    return text


def stored(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of an adapter folder, read by the safetensors library."""
    return load_file(path / "adapters.safetensors") | load_file(path / "merge_encoder.safetensors")


def expected(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The tensors that a checkpoint's adapter folder should hold, by the table of DESIGN 3."""
    tensors = {}
    for name, array in checkpoint.encoder.items():
        layer, part = name.rsplit(".", 1)
        tensors[f"{NAMES[layer]}.{part}"] = array
    for name, array in checkpoint.adapter.items():
        if ".base_layer." not in name:
            ours = name.removeprefix(PREFIX).removesuffix(".weight")
            tensors[ours.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = array.T
    return tensors


# ---- what is written ----


def test_the_hand_made_encoder_file_is_what_torch_reads():
    torch = pytest.importorskip("torch")
    made = make(k=2, d=8, dtype="float16").encoder
    found = torch.load(io.BytesIO(torch_file(made)), weights_only=True)
    assert list(found) == list(made)
    assert all(found[name].numpy().tobytes() == made[name].tobytes() for name in made)


@pytest.mark.parametrize("bin_file", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_tensor_is_there_bit_for_bit(tmp_path, tied, dtype, bin_file):
    made = make(dtype=dtype)
    made.adapter[f"{PREFIX}lm_head.lora_A.weight"][0, :2] = [-0.0, np.finfo(dtype).tiny / 2]
    found = stored(convert(tmp_path, made, bin_file, model=str(tied)))
    wanted = expected(made)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_the_authors_own_checkpoint_converts_bit_for_bit(adapter_path, checkpoint_path):
    torch = pytest.importorskip("torch")
    state = torch.load(checkpoint_path / "encoder.pth", weights_only=True)
    peft = load_file(checkpoint_path / "adapter_model.safetensors")
    wanted = expected(Checkpoint({n: t.numpy() for n, t in state.items()}, {}, peft))
    found = stored(adapter_path)
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in wanted.items())


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("h", [None, 7, 200])
def test_k_d_and_h_are_read_from_the_shapes(tmp_path, k, h):
    sizes = load_adapter(convert(tmp_path, make(k=k, d=16, h=h))).merge.encoder
    assert (sizes.merge_factor, sizes.hidden_size, sizes.inner_size) == (k, 16, h or 2 * k * 16)


def test_the_configs_say_what_was_known(tmp_path, tied):
    made = make()
    made.metrics = {"accuracy": [0.25, 0.5], "best": None}
    path = convert(tmp_path, made, model=str(tied), k=4)
    merge = json.loads((path / "merge_config.json").read_text())
    assert merge["base_model"]["id"] == str(tied)
    assert merge["base_model"]["config"]["vocab_size"] == 700
    assert merge["pad_token_id"] == PAD
    assert merge["layout"] == {"merged": "prompt", "chat_template": False}
    assert merge["provenance"]["metrics"] == made.metrics
    assert merge["provenance"]["source"] == str(tmp_path / "src")
    assert merge["provenance"]["peft_version"] == "0.21.2"
    assert json.loads((path / "adapter_config.json").read_text())["model"] == str(tied)
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)


def test_without_a_base_what_only_it_can_tell_is_left_open(tmp_path):
    merge = load_adapter(convert(tmp_path, make())).merge
    assert merge.base.id == "Qwen/Qwen2.5-0.5B"  # as the PEFT config names it
    assert not merge.base.fields
    assert merge.pad_token_id is None


def test_metrics_with_nan_are_kept_and_the_file_stays_json(tmp_path):
    made = make()
    made.metrics = {"loss": float("nan"), "best": float("-inf")}
    text = (convert(tmp_path, made) / "merge_config.json").read_text()

    def fail(token: str) -> None:
        raise AssertionError(token)

    merge = json.loads(text, parse_constant=fail)
    assert merge["provenance"]["metrics"] == {"loss": "NaN", "best": "-Infinity"}


def test_endless_metrics_are_left_out_and_said_so(tmp_path):
    made = make()
    made.metrics = {"log": ["x" * 100] * 30_000}
    path = convert(tmp_path, made)
    assert load_adapter(path).merge.provenance["metrics"].startswith("left out: 3")


def test_torn_metrics_are_refused(tmp_path):
    source = make().write(tmp_path / "src")
    (source / "metrics.json").write_text("{")
    assert "metrics.json is not valid JSON" in refused(tmp_path, source)


def test_metrics_may_be_absent_and_eval_accuracy_is_kept(tmp_path):
    source = make().write(tmp_path / "src")
    (source / "metrics.json").rename(source / "eval_accuracy.json")
    convert_checkpoint(str(source), tmp_path / "dst")
    provenance = load_adapter(tmp_path / "dst").merge.provenance
    assert provenance["eval_accuracy"] == {"merge_factor": 4}
    assert "metrics" not in provenance


def rounded(array: np.ndarray, dtype: str) -> bytes:
    """To the nearest number of the dtype, ties to even; by numpy, or by hand where it has none."""
    if dtype != "bfloat16":
        return array.astype(dtype).tobytes()
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_rounds_every_tensor_to_the_nearest(tmp_path, dtype):
    made = make()
    adapter = load_adapter(convert(tmp_path, made, dtype=dtype))
    found = {f"encoder.{name}": array for name, array in adapter.encoder_weights.items()}
    found |= {f"lm_head.{name}": array for name, array in adapter.head_weights.items()}
    found |= adapter.lora_weights
    assert found.keys() == expected(made).keys()
    for name, array in expected(made).items():
        assert str(found[name].dtype) == f"mlx.core.{dtype}"
        bits = found[name].view(mx.uint32 if dtype == "float32" else mx.uint16)
        assert np.array(bits).tobytes() == rounded(array, dtype)


def test_weights_that_the_dtype_cannot_hold_are_refused_by_name(tmp_path):
    made = make()
    made.encoder["net.2.weight"][3, 3] = 1e6
    text = refused(tmp_path, made, dtype="float16")
    assert text == "--dtype float16 cannot hold w2.weight: give float32 or bfloat16"
    assert convert(tmp_path, made, dtype="bfloat16").is_dir()


def test_an_unknown_dtype_is_refused_with_the_choices(tmp_path):
    text = refused(tmp_path, make(), dtype="float64")
    assert text == "dtype is 'float64', expected one of float32, float16, bfloat16"


# ---- encoder.pth ----


def test_the_prefix_of_distributed_training_is_dropped(tmp_path):
    made = make()
    wanted = expected(made)
    made.encoder = {f"module.{name}": array for name, array in made.encoder.items()}
    found = stored(convert(tmp_path, made))
    assert all(found[name].tobytes() == array.tobytes() for name, array in wanted.items())
    made.encoder["net.0.bias"] = made.encoder["module.net.0.bias"]
    shutil.rmtree(tmp_path / "dst")
    assert "with and without the prefix module." in refused(tmp_path, made)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda e: e.pop("net.2.bias"), "net.2.bias is missing, expected shape (256,)"),
        (lambda e: e.update(extra=np.ones(3, "f4")), "extra (3,) belongs to nothing here"),
        (
            lambda e: e.update({"net.0.bias": np.ones(5, "f4")}),
            "net.0.bias has shape (5,), expected (512,)",
        ),
        (lambda e: e.pop("net.0.weight"), "not a merge encoder: expected 2-dimensional"),
        (
            lambda e: e.update({"net.4.weight": np.ones((65, 256), "f4")}),
            "net.0.weight (512, 256) and net.4.weight (65, 256) give no whole merge factor",
        ),
        (
            lambda e: e.update({"net.4.weight": np.ones((256, 256), "f4")}),
            "give no whole merge factor of at least 2",
        ),
        (lambda e: e.update({"net.4.weight": np.ones((0, 256), "f4")}), "no whole merge factor"),
        (lambda e: e.update({"net.0.weight": np.ones((0, 256), "f4")}), "inner_size is 0"),
        (lambda e: [e.pop(name) for name in [*e][:5]], "found net.4.bias"),
    ],
    ids=range(9),
)
def test_an_encoder_that_does_not_fit_itself_is_refused(tmp_path, change, complaint):
    made = make()
    change(made.encoder)
    assert complaint in refused(tmp_path, made)


def test_another_k_than_expected_is_refused_with_both(tmp_path):
    text = refused(tmp_path, make(k=3), k=4)
    assert "merges K = 3 tokens, but --k is 4: give --k 3 or leave it out" in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_diverged_run_is_refused_by_tensor(tmp_path, value):
    made = make()
    made.encoder["net.2.weight"][-1, -1] = value
    made.adapter[f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"][0, 0] = value
    made.adapter[f"{PREFIX}lm_head.lora_A.weight"][0, 0] = value
    lines = refused(tmp_path, made).splitlines()
    assert [line.split()[1] for line in lines[1:]] == [
        *("w2.weight", "model.layers.1.mlp.down_proj.lora_b", "lm_head.lora_a")
    ]
    assert all("holds NaN or infinite values: the training run diverged" in x for x in lines[1:])


def test_everything_wrong_with_one_checkpoint_is_listed_at_once(tmp_path):
    made = make(k=3)
    made.encoder["net.0.bias"] = np.full(5, np.nan, "f4")
    made.config["use_dora"] = True
    source = made.write(tmp_path / "src")
    (source / "metrics.json").write_text("[")
    lines = refused(tmp_path, source, k=4).splitlines()
    assert lines[0] == f"{source} cannot be converted: 5 problems"
    for part in ("--k is 4", "net.0.bias has shape", "use_dora", "metrics.json", "w1.bias holds"):
        assert sum(part in line for line in lines[1:]) == 1


# ---- finding it ----


def test_a_flat_folder_is_the_checkpoint_whatever_lies_below(tmp_path):
    source = make().write(tmp_path)
    make(k=2).write(tmp_path / "best")
    assert find_checkpoint(str(source)) == tmp_path


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("best",), "best"),
        (("last", "best", "step_best", "step_last"), "best"),
        (("last", "step_best", "step_last"), "step_best"),
        (("step_last", "last"), "last"),
        (("step_last", "other"), "step_last"),
        (("small_stage",), "small_stage"),
    ],
)
def test_the_best_or_last_sub_folder_is_found(tmp_path, folders, found):
    for i, name in enumerate(folders):
        make(k=2 + i).write(tmp_path / name)
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert find_checkpoint(str(tmp_path)) == tmp_path / found


def test_several_other_sub_folders_are_listed(tmp_path):
    for name in ("stage_b", "stage_a"):
        make().write(tmp_path / name)
    text = refused(tmp_path, tmp_path)
    assert text.endswith("holds several checkpoints (stage_a, stage_b): name one of them")


@pytest.mark.parametrize(
    "missing", ["encoder.pth", "adapter_config.json", "adapter_model.safetensors"]
)
def test_a_missing_part_is_named(tmp_path, missing):
    source = make().write(tmp_path / "src")
    (source / missing).unlink()
    text = refused(tmp_path, source)
    assert missing in text
    assert "\n" not in text


def test_what_is_no_checkpoint_is_one_line(tmp_path, tied):
    (tmp_path / "empty").mkdir()
    for source, why in (
        (tmp_path / "empty", "holds no encoder.pth and no adapter_config.json"),
        (tied, "holds no encoder.pth and no adapter_config.json"),
        (tied / "config.json", "is a file: give the folder that holds encoder.pth"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        text = refused(tmp_path, source)
        assert why in text
        assert "\n" not in text


@pytest.mark.parametrize("source", ["nobody/nothing", "no/such/folder", "", "a b"])
def test_a_hub_repo_that_cannot_be_had_is_one_line(tmp_path, source):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    text = refused(tmp_path, source)
    assert "\n" not in text


# ---- the head ----


@pytest.mark.parametrize("known", [True, False])
def test_the_head_of_a_tied_or_unknown_base_lies_beside_the_encoder(tmp_path, tied, known):
    path = convert(tmp_path, make(), model=str(tied) if known else None)
    assert {"lm_head.lora_a", "lm_head.lora_b"} <= set(
        load_file(path / "merge_encoder.safetensors")
    )
    assert not [n for n in load_file(path / "adapters.safetensors") if "lm_head" in n]
    model, _ = load(str(tied), path)
    assert "lora_a" in merged_embedding(model)


def test_a_base_that_does_not_say_whether_it_is_tied_counts_as_unknown(tmp_path):
    config = qwen2_config()
    del config["tie_word_embeddings"]
    base = write_base(tmp_path / "base", config)
    path = convert(tmp_path, make(), model=str(base))
    assert "lm_head.lora_a" in load_file(path / "merge_encoder.safetensors")


def test_the_head_of_an_untied_base_lies_with_the_other_lora(tmp_path, untied):
    path = convert(tmp_path, make(), model=str(untied))
    assert {"lm_head.lora_a", "lm_head.lora_b"} <= set(load_file(path / "adapters.safetensors"))
    assert not [n for n in load_file(path / "merge_encoder.safetensors") if "lm_head" in n]


@pytest.mark.parametrize("head", ["tied", "untied", "untied_unknown", "untied_alone"])
def test_mlx_lm_loads_the_lora_part_of_what_was_written(tmp_path, tied, untied, head):
    """On an untied base converted with --model, that is all of it: the logits are ours."""
    base = tied if head == "tied" else untied
    made = make()
    if head == "untied_alone":
        made.config["target_modules"] = ["lm_head"]
        made.adapter = {n: a for n, a in made.adapter.items() if "lm_head" in n}
    path = convert(tmp_path, made, model=None if "unknown" in head else str(base))
    theirs = mlx_lm.utils.load_adapters(
        build(qwen2_config(tie_word_embeddings=head == "tied")), str(path)
    )
    weights = dict(tree_flatten(theirs.parameters()))
    for name, array in load_file(path / "adapters.safetensors").items():
        assert np.array(weights[name]).tobytes() == array.tobytes()
    ours, _ = load(str(base), path)
    if head in ("untied", "untied_alone"):
        theirs, _ = mlx_lm.utils.load(str(base), adapter_path=str(path))
        ids = mx.array([[5, 6, 7, 8]])
        plain, _ = mlx_lm.utils.load(str(base))
        assert mx.array_equal(ours(ids), theirs(ids))
        assert not mx.allclose(ours(ids), plain(ids))


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0]},
        {"rank_pattern": {"layers.1.mlp.down_proj": 2}},
        {"alpha_pattern": {"v_proj": 3}},
    ],
)
def test_mlx_lm_refuses_a_lora_it_has_no_schema_for_instead_of_misreading_it(
    tmp_path, tied, options
):
    made = make(head=False, **options)
    if "layers_to_transform" in options:
        made.adapter = {n: a for n, a in made.adapter.items() if ".layers.0." in n}
    if "rank_pattern" in options:
        name = f"{PREFIX}model.layers.1.mlp.down_proj.lora_"
        made.adapter[f"{name}A.weight"] = made.adapter[f"{name}A.weight"][:2].copy()
        made.adapter[f"{name}B.weight"] = made.adapter[f"{name}B.weight"][:, :2].copy()
    path = convert(tmp_path, made, model=str(tied))
    with pytest.raises(KeyError, match="missing required key 'scale'"):
        mlx_lm.utils.load_adapters(build(qwen2_config()), str(path))
    assert load(str(tied), path)


# ---- the base ----


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"d": 32}, "has hidden_size 64, the encoder has 32"),
        ({"vocab_size": 800}, "has vocab_size 700, lm_head's LoRA has 800"),
        ({"layers": 3}, "has 2 layers, the LoRA covers 3"),
    ],
)
@pytest.mark.parametrize("tie", [True, False])
def test_a_base_that_does_not_fit_is_refused_by_name(
    tmp_path, tied, untied, options, complaint, tie
):
    base = tied if tie else untied
    text = refused(tmp_path, make(**options), model=str(base))
    assert f"--model {base} {complaint}" in text


def test_a_head_that_does_not_fit_the_encoder_is_refused_without_a_base(tmp_path):
    made = make()
    wide = make(d=80)
    made.adapter |= {n: a for n, a in wide.adapter.items() if "lm_head" in n}
    assert "lm_head's LoRA reads 80 features, the encoder writes 64" in refused(tmp_path, made)


def test_a_base_that_cannot_be_read_is_the_models_error(tmp_path, tied):
    broken = tmp_path / "broken"
    shutil.copytree(tied, broken)
    (broken / "tokenizer.json").write_text("{")
    for model in (tmp_path / "absent", broken, tmp_path):
        assert "\n" not in refused(tmp_path, make(), kind=ModelError, model=str(model))


# ---- the destination ----


def test_an_adapter_is_replaced_only_by_force(tmp_path):
    path = convert(tmp_path, make())
    source = make(k=2).write(tmp_path / "other")
    before = {name: (path / name).read_bytes() for name in FILES}
    with pytest.raises(AdapterError, match="exists: choose another folder, or give --force"):
        convert_checkpoint(str(source), path)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    convert_checkpoint(str(source), path, force=True)
    assert load_adapter(path).merge.encoder.merge_factor == 2


def test_a_failed_conversion_leaves_the_adapter_it_was_to_replace(tmp_path):
    path = convert(tmp_path, make())
    before = {name: (path / name).read_bytes() for name in FILES}
    made = make(k=2)
    made.encoder["net.0.bias"][0] = np.nan
    source = made.write(tmp_path / "other")
    with pytest.raises(CheckpointError, match="diverged"):
        convert_checkpoint(str(source), path, force=True)
    assert {name: (path / name).read_bytes() for name in FILES} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "other", "src"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_adapter_is_never_replaced(tmp_path, kind, force):
    path, source = tmp_path / "dst", make().write(tmp_path / "src")
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        (path / "precious").mkdir(parents=True)
    else:
        path.symlink_to(source)
    why = "is no adapter folder, and --force" if force else "exists: choose another folder"
    assert why in refused(tmp_path, source, kind=AdapterError, force=force)


def test_the_checkpoint_itself_is_never_replaced(tmp_path):
    source = make().write(tmp_path / "src")
    with pytest.raises(AdapterError, match="is no adapter folder"):
        convert_checkpoint(str(source), source, force=True)
    assert (source / "encoder.pth").is_file()


def test_a_place_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    source = make().write(tmp_path / "src")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AdapterError, match=r"cannot write .*/file/dst: ") as caught:
        convert_checkpoint(str(source), tmp_path / "file" / "dst")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_parents_of_the_destination_are_made(tmp_path):
    source = make().write(tmp_path / "src")
    convert_checkpoint(str(source), tmp_path / "a" / "b" / "dst")
    assert load_adapter(tmp_path / "a" / "b" / "dst")
    assert os.listdir(tmp_path / "a" / "b") == ["dst"]  # noqa: PTH208
