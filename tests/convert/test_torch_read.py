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


def test_the_reference_checkpoint_is_read_bit_for_bit():
    assert_same(read_state_dict(FIXTURE), torch.load(FIXTURE, weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_bits_of_every_dtype_survive_in_every_pickle_protocol(tmp_path, protocol):
    tensors = OrderedDict((name, random_tensor(name, 5, 7, 3)) for name in DTYPES)
    path = save(tmp_path / "x.pth", tensors, pickle_protocol=protocol)
    assert_same(read_state_dict(path), tensors)


def test_views_empty_and_tied_tensors_are_read_through_their_strides(tmp_path):
    base = random_tensor("float32", 4, 6, 5)
    tensors = {
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "every_other": base[::2, 1::3],
        "column": base[:, 2, 4],
        "scalar": base[1, 2, 3],
        "none": base[4:],
        "one_wide": base[:1, :, 4:],
        "half": random_tensor("bfloat16", 6, 4).T,
    }
    shapes = [(), (0,), (0, 3), (3, 0), (2, 0, 4), (1, 1), (1,) * 8]
    tensors |= {str(shape): torch.ones(shape) for shape in shapes}
    path = save(tmp_path / "x.pth", tensors)
    assert_same(read_state_dict(path), torch.load(path, weights_only=True))


def test_a_module_with_parameters_buffers_and_metadata_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    for keep_vars in (False, True):
        tensors = module.state_dict(keep_vars=keep_vars)
        assert tensors._metadata
        path = save(tmp_path / "x.pth", tensors)
        assert_same(read_state_dict(str(path)), tensors)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torch_saved_but_cannot_be_read_says_what_to_save(tmp_path):
    ones, module = torch.ones(2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(ones).sum().backward()
    optimizer.step()
    again = "torch.save(torch.load(path, weights_only=True), new_path)"
    for value, found, remedy in (
        ({"w": ones.double()}, "float64", "save it as float32"),
        ({"w": ones.to(torch.complex64)}, "complex", "two real tensors"),
        ({"w": ones.to(torch.float8_e4m3fn)}, "float8", "save it as float16"),
        ({"w": torch.ones(2, 2).to_sparse()}, "sparse", "to_dense()"),
        ({"w": ones._neg_view()}, "_rebuild_tensor_v2", "state_dict()"),
        ({"w": torch.ones(1).expand(9000)}, "at most 4 times", "contiguous()"),
        (module, "'torch.nn.modules.linear.Linear'", "state_dict()"),
        (ones, "type Tensor", "state_dict()"),
        ({"model": {"w": ones}, "epoch": 3}, "'model' (dict), 'epoch'", "['model']"),
        ({"o": optimizer.state_dict(), "loss": 0.5, "n": None}, "'o' (dict), 'loss'", "['o']"),
        (torch.jit.script(module), "TorchScript", "state_dict()"),
        (None, "before 1.6", again),
    ):
        path = tmp_path / "x.pth"
        if value is None:
            save(path, {"w": ones}, _use_new_zipfile_serialization=False)
        elif isinstance(value, torch.jit.ScriptModule):
            torch.jit.save(value, path)
        else:
            save(path, value)
        message = refusal(path)
        assert found in message
        assert remedy in message


@pytest.mark.slow  # torch.distributed takes 6 s to import
def test_a_tensor_of_a_sharded_model_says_how_to_make_it_whole(tmp_path):
    from torch.distributed import tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = tensor.init_device_mesh("cpu", (1,))
        whole = torch.ones(4, 4)
        save(tmp_path / "x.pth", {"w": tensor.distribute_tensor(whole, mesh, [tensor.Shard(0)])})
    finally:
        torch.distributed.destroy_process_group()
    message = refusal(tmp_path / "x.pth")
    assert message.endswith("found a DTensor, one rank's part of a tensor; save its full_tensor()")


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
    assert (report["taken"], report["events"]) == ([], [])
    assert min(report["refused"], report["read"]) > 0
    assert report["peak_bytes"] < 300e6
    assert list(cwd.iterdir()) == []
    # Where both readers take a mutated file, they take the same from it.
    compared = 0
    for path in scratch.glob("read-*.pth"):
        try:
            with warnings.catch_warnings(action="ignore"):  # of protocols other than 2
                tensors = torch.load(path, weights_only=True)
        except Exception:  # torch is stricter in places: for one, in protocol 4
            continue
        assert_same(read_state_dict(path), tensors)
        compared += 1
    assert compared > 0
