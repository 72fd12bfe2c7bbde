"""Written ``.pth`` files: what torch reads is what was written, bit for bit.

The oracles are ``torch.load``, ``zipfile`` and the zip format itself, not the project's own reader.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmerge_mlx.convert import torch_write
from kmerge_mlx.convert.torch_read import read_state_dict
from kmerge_mlx.convert.torch_write import write_state_dict

torch = pytest.importorskip("torch")

DTYPES = {
    mx.float32: (np.uint32, torch.float32, torch.int32),
    mx.float16: (np.uint16, torch.float16, torch.int16),
    mx.bfloat16: (np.uint16, torch.bfloat16, torch.int16),
}
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(
    st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12
)  # a dot or a quote, an accent


@st.composite
def arrays(draw):
    dtype, shape = draw(st.sampled_from([*DTYPES])), draw(SHAPES)
    kind = DTYPES[dtype][0]
    values = st.integers(0, np.iinfo(kind).max)
    flat = draw(st.lists(values, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return np.array(flat, kind).reshape(shape), dtype


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, arrays(), max_size=5), st.booleans())
def test_torch_and_the_reader_here_load_every_bit(tmp_path_factory, tensors, mmap):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    path.unlink(missing_ok=True)  # the last one may still be mapped
    write_state_dict(path, {name: mx.array(bits).view(d) for name, (bits, d) in tensors.items()})
    found = torch.load(path, weights_only=True, mmap=mmap)
    ours = read_state_dict(path) if all(map(str.isprintable, tensors)) else {}
    assert list(found) == list(tensors)
    assert list(ours) in ([], list(tensors))
    for name, (bits, dtype) in tensors.items():
        _, theirs, integer = DTYPES[dtype]
        assert (found[name].dtype, tuple(found[name].shape)) == (theirs, bits.shape)
        assert found[name].contiguous().view(integer).numpy().tobytes() == bits.tobytes()
        if ours:
            assert (ours[name].dtype, ours[name].shape) == (dtype, bits.shape)
            same_width = mx.uint32 if dtype == mx.float32 else mx.uint16
            assert np.array(ours[name].view(same_width)).tobytes() == bits.tobytes()


@pytest.fixture
def tensors() -> dict[str, mx.array]:
    mx.random.seed(0)
    return {
        "net.0.weight": mx.random.normal((5, 7)),
        "turned": mx.random.normal((3, 9)).T,
        "strided": mx.random.normal((8, 6))[::2, 1:4].astype(mx.bfloat16),
        "empty": mx.zeros((0, 3)),
        "scalar": mx.array(2.5, mx.float16),
    }


def test_a_loaded_state_dict_is_an_ordered_dict_that_modules_take(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    state = module.state_dict()
    write_state_dict(
        tmp_path / "m.pth", {name: mx.array(t.numpy()) + 1 for name, t in state.items()}
    )
    found = torch.load(tmp_path / "m.pth", weights_only=True)
    assert type(found) is type(state)
    module.load_state_dict(found, strict=True)


@pytest.mark.parametrize("large", [40, 1 << 30])
def test_views_are_written_as_they_read_stored_and_aligned(tmp_path, tensors, monkeypatch, large):
    """From 1 GiB on, sizes are written as zip64 has them; with a lower limit, small ones too."""
    path = tmp_path / "w.pth"
    monkeypatch.setattr(torch_write, "_LARGE", large)
    write_state_dict(path, tensors)
    ours, theirs = read_state_dict(path), torch.load(path, weights_only=True, mmap=True)
    assert list(ours) == list(theirs) == list(tensors)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[:2] == ["archive/data.pkl", "archive/byteorder"]
        for i, (name, array) in enumerate(tensors.items()):
            assert ours[name].tolist() == theirs[name].tolist() == array.tolist()
            assert theirs[name].is_contiguous()
            entry = archive.getinfo(f"archive/data/{i}")
            name_and_extra = struct.unpack_from("<2H", data, entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(name_and_extra)
            assert start % 64 == 0
            assert entry.compress_type == zipfile.ZIP_STORED
            assert entry.file_size == array.nbytes
            assert data[start : start + entry.file_size] == archive.read(entry)
        # What a stranger's scanner would look for: every global in the file.
        steps = pickletools.genops(archive.read("archive/data.pkl"))
        storages = {f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16")}
        functions = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
        assert {name for op, name, _ in steps if op.name == "GLOBAL"} == storages | functions
