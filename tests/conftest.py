"""What several test modules need: the authors' checkpoint, its adapter, the loaded model."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import settings

from tests.cli_runner import PLAIN_USER

# No test may reach the hub; set before huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# On Metal, products of float32 may be rounded to 19 bits; ours are compared with the CPU's.
os.environ["MLX_ENABLE_TF32"] = "0"

# There is a worker for each core: threads of OpenBLAS beside them would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# On Apple silicon the CPU backend is tested, too.
if os.environ.get("TEST_DEVICE") == "cpu":
    mx.set_default_device(mx.cpu)

# A shell that starts a run in the background has Ctrl-C ignored, by the run and by its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run; `--hypothesis-profile thorough`: others each time, and many more.
settings.register_profile("thorough", max_examples=2100)
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

UPSTREAM = Path(__file__).parent / "fixtures" / "upstream_tied_k4"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file, of the example, begins first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_smollm2.py")


@pytest.fixture(scope="session", autouse=True)
def processes_of_a_plain_user():
    """The processes that tests start find no PyTorch. (pytest's own workers start before this.)"""
    os.environ["PYTHONPATH"] = str(PLAIN_USER)


@pytest.fixture(scope="session")
def base_path() -> Path:
    """The tiny Qwen2 base model that the fixture checkpoint was trained on."""
    return UPSTREAM / "base"


@pytest.fixture(scope="session")
def checkpoint_path() -> Path:
    """A checkpoint folder written by the authors' own code: K = 4, D = 64, tied."""
    return UPSTREAM / "checkpoint"


@pytest.fixture(scope="session")
def adapter_path(tmp_path_factory, base_path, checkpoint_path) -> Path:
    """The fixture checkpoint, converted. Read-only: copy it to change it."""
    from kmerge_mlx.convert.checkpoint import convert_checkpoint

    path = tmp_path_factory.mktemp("converted") / "adapter"
    convert_checkpoint(str(checkpoint_path), path, model=str(base_path), k=4)
    return path


@pytest.fixture(scope="session")
def live_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """Gives a checkpoint's folder by its name: ``upstream``, or one that PyTorch trains now, once.

    It holds ``base/``, ``checkpoint/`` and the answers that PyTorch gives (``expected.*``).
    """

    @cache
    def made(name: str) -> Path:
        if name == "upstream":
            return UPSTREAM
        from tests.reference.make_checkpoints import SPECS, make_checkpoint

        folder = tmp_path_factory.mktemp(name)
        make_checkpoint(folder, SPECS[name])
        return folder

    return made


@pytest.fixture
def model_and_tokenizer(base_path, adapter_path):
    """A fresh model with the fixture adapter, and its tokenizer."""
    from kmerge_mlx import load

    return load(str(base_path), adapter_path, 4)


@pytest.fixture(scope="module")
def tiny():
    """A random K = 4 model whose greedy text does not stop early, and its tokenizer."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    from kmerge_mlx.model import attach
    from tests.tiny import PAD, build, qwen2_config, random_adapter

    model = build(qwen2_config())
    attach(model, random_adapter(model, 4), PAD)
    model.context_length = 32_768
    return model, load_tokenizer(UPSTREAM / "base")
