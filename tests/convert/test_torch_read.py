"""The .pth reader against torch: the same bits, or an error that says what to save instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kmerge_mlx.convert.torch_read import read_state_dict
from tests.convert.test_hostile_torch_files import FIXTURE, refusal
from tests.hostile_torch_parts import Record, checkpoint, state

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
DTYPES = [
    *("float32", "float16", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64"),
    *("uint16", "uint32", "uint64"),
]


def random_tensor(dtype: str, *shape: int) -> torch.Tensor:
    """Any bits: infinities, subnormals, NaNs with payloads, both zeros."""
    rng = np.random.default_rng(7)
    if dtype == "bool":
        return torch.from_numpy(rng.integers(0, 2, shape).astype(bool))
    kind = getattr(torch, dtype)
    raw = rng.bytes(int(np.prod(shape)) * kind.itemsize)
    return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape)


def torch_bytes(array: torch.Tensor) -> bytes:
    return array.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def mlx_bytes(array: mx.array) -> bytes:
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def assert_same(arrays: dict[str, mx.array], tensors: dict[str, torch.Tensor]) -> None:
    assert list(arrays) == list(tensors)
    for name, array in arrays.items():
        expected = tensors[name]
        assert str(array.dtype).split(".")[-1] == str(expected.dtype).split(".")[-1], name
        assert array.shape == tuple(expected.shape), name
        assert mlx_bytes(array) == torch_bytes(expected), name


def save(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


# ---- what torch.save writes is read as torch.load reads it ----


def test_the_reference_checkpoint_is_read_bit_for_bit():
    assert_same(read_state_dict(FIXTURE), torch.load(FIXTURE, weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_bits_of_every_dtype_survive_in_every_pickle_protocol(tmp_path, protocol):
    tensors = OrderedDict((name, random_tensor(name, 5, 7, 3)) for name in DTYPES)
    path = save(tmp_path / "x.pth", tensors, pickle_protocol=protocol)
    assert_same(read_state_dict(path), tensors)


def test_views_are_read_through_their_strides(tmp_path):
    base = random_tensor("float32", 4, 6, 5)
    tensors = {
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "every_other": base[::2, 1::3],
        "row": base[3, 5],
        "column": base[:, 2, 4],
        "scalar": base[1, 2, 3],
        "none": base[4:],
        "one_wide": base[:1, :, 4:],
        "half": random_tensor("bfloat16", 6, 4).T,
    }
    path = save(tmp_path / "x.pth", tensors)
    assert_same(read_state_dict(path), torch.load(path, weights_only=True))


def test_empty_and_zero_dimensional_tensors_keep_their_shapes(tmp_path):
    shapes = [(), (0,), (0, 3), (3, 0), (2, 0, 4), (1, 1), (1,) * 8]
    path = save(tmp_path / "x.pth", {str(shape): torch.ones(shape) for shape in shapes})
    assert_same(read_state_dict(path), torch.load(path, weights_only=True))


def test_tied_weights_are_read_under_each_name(tmp_path):
    weight = random_tensor("float16", 8, 4)
    path = save(tmp_path / "x.pth", {"head": weight, "embed": weight, "rows": weight[2:5]})
    assert_same(read_state_dict(path), torch.load(path, weights_only=True))


def test_a_module_with_parameters_buffers_and_metadata_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    for keep_vars in (False, True):
        tensors = module.state_dict(keep_vars=keep_vars)
        assert tensors._metadata
        path = save(tmp_path / "x.pth", tensors)
        assert_same(read_state_dict(str(path)), tensors)


def test_a_big_endian_file_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(checkpoint(state(), Record("archive/byteorder", b"big")))
    assert "found the byte order b'big'" in refusal(path)


# ---- what torch.save also writes is refused by name ----


@pytest.mark.parametrize(
    ("value", "found", "remedy"),
    [
        (lambda: {"w": torch.ones(2, dtype=torch.float64)}, "float64", "save it as float32"),
        (lambda: {"w": torch.ones(2, dtype=torch.complex64)}, "complex", "two real tensors"),
        (lambda: {"w": torch.ones(2).to(torch.float8_e4m3fn)}, "float8", "save it as float16"),
        (lambda: {"w": torch.ones(2, 2).to_sparse()}, "sparse", "to_dense()"),
        (lambda: {"w": torch.ones(2)._neg_view()}, "_rebuild_tensor_v2", "state_dict()"),
        (lambda: {"w": torch.ones(1).expand(9)}, "at most 4 times", "contiguous()"),
        (lambda: torch.nn.Linear(2, 2), "'torch.nn.modules.linear.Linear'", "state_dict()"),
        (lambda: torch.ones(2), "type Tensor", "state_dict()"),
        (
            lambda: {"model": {"w": torch.ones(2)}, "epoch": 3},
            "'model' (dict), 'epoch'",
            "['model']",
        ),
    ],
)
def test_what_torch_saved_but_cannot_be_read_says_what_to_save(tmp_path, value, found, remedy):
    message = refusal(save(tmp_path / "x.pth", value()))
    assert found in message
    assert remedy in message


def test_a_training_checkpoint_names_its_top_level(tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    whole = {"optimizer": optimizer.state_dict(), "epoch": 3, "loss": 0.5, "note": None}
    message = refusal(save(tmp_path / "x.pth", whole))
    assert all(f"'{name}'" in message for name in whole)


def test_the_formats_before_the_zip_say_how_to_save_again(tmp_path):
    path = tmp_path / "x.pth"
    save(path, {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    message = refusal(path)
    assert "before 1.6" in message
    assert "torch.save(torch.load(path, weights_only=True), new_path)" in message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_refused_by_name(tmp_path):
    path = tmp_path / "x.pth"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in refusal(path)


# ---- in bulk ----


@pytest.mark.slow
def test_1500_mutated_files_are_read_or_refused_in_little_memory(tmp_path):
    seeds, scratch, cwd = tmp_path / "seeds", tmp_path / "scratch", tmp_path / "cwd"
    for folder in (seeds, scratch, cwd):
        folder.mkdir()
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    tensors = {name: random_tensor(name, 3, 2) for name in DTYPES[:9]}
    weight = random_tensor("float32", 4, 6)
    save(seeds / "module.pth", module.state_dict())
    save(seeds / "parameters.pth", module.state_dict(keep_vars=True))
    save(seeds / "dtypes.pth", tensors)
    save(seeds / "protocol_4.pth", tensors | {"u": random_tensor("uint16", 2)}, pickle_protocol=4)
    save(seeds / "views.pth", {"tied": weight, "t": weight.T, "part": weight[1:3, ::2]})

    command = [sys.executable, "-m", "tests.hostile_torch_process", str(seeds), str(scratch)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["taken"] == []
    assert report["events"] == []
    assert report["refused"] > 0
    assert report["read"] > 0
    assert report["peak_bytes"] < 300e6
    assert list(cwd.iterdir()) == []
    agree_with_torch(scratch.glob("read-*.pth"))


def agree_with_torch(paths) -> None:
    """Where both readers take a mutated file, they take the same from it."""
    compared = 0
    for path in paths:
        try:
            with warnings.catch_warnings(action="ignore"):  # of protocols other than 2
                tensors = torch.load(path, weights_only=True)
        except Exception:  # torch is stricter in places: for one, in protocol 4
            continue
        assert_same(read_state_dict(path), tensors)
        compared += 1
    assert compared > 0
