"""Names of tensors: whatever PyTorch or PEFT wrapped, a checkpoint converts to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kmerge_mlx.convert.checkpoint import convert_checkpoint
from tests.checkpoints import PREFIX, Checkpoint, make
from tests.conversions import convert, refused

WRAPPERS = [
    *("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
    *(PREFIX, "module._orig_mod.", "_orig_mod.module."),
]


def converted(folder: Path, made: Checkpoint, bin_file: bool = False) -> dict[str, object]:
    """The weights files of an adapter as bytes; its LoRA config without the order of its names."""
    path = convert(folder, made, bin_file)
    found = {n: (path / f"{n}.safetensors").read_bytes() for n in ("adapters", "merge_encoder")}
    config = json.loads((path / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = sorted(config["lora_parameters"].get("keys", ()))
    shutil.rmtree(folder / "src")
    shutil.rmtree(path)
    return found | {"config": config}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, object]:
    """What the checkpoint converts to without any wrapper."""
    return converted(tmp_path_factory.mktemp("plain"), make())


@pytest.mark.parametrize("place", ["", PREFIX, "model.layers.", "layers.0.", "mlp.", "lm_head."])
def test_a_wrapper_at_any_depth_leaves_the_same_bits(tmp_path, plain, place):
    for wrapper in WRAPPERS:
        made = make()
        adapter = {name.replace(place, place + wrapper, 1): a for name, a in made.adapter.items()}
        assert adapter.keys() != made.adapter.keys()
        made.adapter = adapter
        made.encoder = {wrapper + name: array for name, array in made.encoder.items()}
        assert converted(tmp_path, made, bin_file=wrapper == "module.") == plain


def test_the_names_that_torch_gives_a_wrapped_encoder_are_known(tmp_path, plain):
    torch = pytest.importorskip("torch")
    made = make()
    net = torch.nn.Module()
    layers = [torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)]
    net.net = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(256, 64))
    net.load_state_dict({name: torch.from_numpy(array) for name, array in made.encoder.items()})
    for wrapped in (torch.compile(net), torch.compile(torch.nn.DataParallel(net))):
        state = wrapped.state_dict()
        assert not state.keys() & made.encoder.keys()
        made.encoder = {name: tensor.numpy() for name, tensor in state.items()}
        assert converted(tmp_path, made) == plain


def test_options_that_name_wrapped_modules_mean_them(tmp_path):
    """A pattern that no longer fitted would leave another scale, and no other trace."""
    names = ["q_proj", "layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "v_proj"]
    options = {"target_modules": names, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}
    wanted = converted(tmp_path, make(head=False, **options))
    names = ["q_proj", "layers.0._orig_mod.mlp.down_proj", f"{PREFIX}model.layers.1.mlp.down_proj"]
    options["target_modules"] = [*names, "v_proj"]
    for pattern in (
        "layers.0._orig_mod.self_attn.q_proj",
        r"layers\.0\._orig_mod\.self_attn.q_proj",
    ):
        options["alpha_pattern"] = {pattern: 3}
        assert converted(tmp_path, make(head=False, **options)) == wanted


def test_one_module_under_two_names_is_refused(tmp_path):
    made = make()
    name = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"
    made.adapter[name.replace("mlp.", "mlp._orig_mod.")] = made.adapter[name]
    assert "is there under two names" in refused(tmp_path, made)


def test_names_of_automodel_become_those_of_the_causal_model(tmp_path, plain):
    made = make()
    made.adapter = {n.replace(f"{PREFIX}model.", PREFIX): a for n, a in made.adapter.items()}
    assert converted(tmp_path, made) == plain
    both = made.adapter | make().adapter
    made.adapter = both
    text = refused(tmp_path, made)
    assert "some modules are there with and without the prefix model. (keep one)" in text


def test_layers_are_picked_by_the_names_that_peft_saw(tmp_path):
    made = make(target_modules=r"layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)", head=False)
    made.adapter = {n.replace(f"{PREFIX}model.", PREFIX): a for n, a in made.adapter.items()}
    convert_checkpoint(str(made.write(tmp_path / "src")), tmp_path / "dst")
