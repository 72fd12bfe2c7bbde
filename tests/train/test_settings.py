"""The settings of a run: mlx-lm's names and defaults, and what does not go together."""

from __future__ import annotations

from dataclasses import fields

import pytest
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, build_parser, yaml_loader
from mlx_lm.utils import _parse_size

from kmerge_mlx.cli.inputs import as_yaml
from kmerge_mlx.errors import SettingsError
from kmerge_mlx.settings import option_of
from kmerge_mlx.train.settings import ELSEWHERE, TrainSettings
from tests.cli_runner import assert_one_error, run

# What belongs to the method, and so has the paper's default or must be given.
OURS = {
    *("model", "data", "num_layers", "lora_parameters", "optimizer", "learning_rate"),
    "optimizer_config",  # the same: no arguments for any optimizer
}
FIELDS = {field.name: field for field in fields(TrainSettings)}
OUTPUTS = {"adapter_path", "resume", "force", "plot", "report_to", "project_name"}


def refused(**settings: object) -> str:
    with pytest.raises(SettingsError) as caught:
        TrainSettings.of(settings)
    return str(caught.value)


def test_defaults_are_mlx_lms_but_for_those_that_belong_to_the_method():
    ours = {name: getattr(TrainSettings(), name) for name in FIELDS}
    shared = set(ours) & set(CONFIG_DEFAULTS)
    assert {name for name in shared if ours[name] != CONFIG_DEFAULTS[name]} == OURS


def test_every_key_and_flag_of_mlx_lm_has_a_place_or_an_explanation():
    assert set(CONFIG_DEFAULTS) - set(FIELDS) == set(ELSEWHERE)
    theirs = {action.dest for action in build_parser()._actions} - {"help"}
    flags = {name for name, field in FIELDS.items() if not option_of(field).yaml_only}
    assert theirs - flags - set(ELSEWHERE) == set()
    for name in ELSEWHERE:
        assert refused(**{name: CONFIG_DEFAULTS[name]}) == f"train: {name}: {ELSEWHERE[name]}"


def test_a_flag_beats_the_file_and_the_file_beats_the_default(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("iters: 7\nbatch_size: 3\nk: 2\nlora_parameters: {rank: 2}\nteacher: null\n")
    result = run("train", "--iters", 9, "--merge-factor", 3, "-c", file, "--print-config")
    assert (result.code, result.err) == (0, "")
    found = yaml.load(result.out, yaml_loader)
    assert list(found) == list(FIELDS)
    assert (found["iters"], found["k"], found["batch_size"], found["save_every"]) == (9, 3, 3, 100)
    assert (found["lora_parameters"], found["teacher"]) == ({"rank": 2}, None)


def test_printed_settings_read_back_are_the_same_settings(tmp_path):
    given = {
        "model": "1e5",  # text that YAML would take for a number, a date, a truth
        "task": "textualized-tree",
        "project_name": "2020-01-01",
        "language": "on",
        "adapter_path": "a folder/ünï: # 'quoted'",
        "curriculum": ["small", {"stage": "xsmall", "threshold": 0.5}],
        "lora_parameters": {"rank": 2, "scale": 1e-5, "keys": ["self_attn.q_proj"]},
        "optimizer_config": {"adamw": {"betas": [0.9, 0.98]}},
        "lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 10], "warmup": 3},
        "clear_cache_threshold": "4GB",
        "learning_rate": 3e-7,
    }
    settings = TrainSettings.of(given)
    file = tmp_path / "printed.yaml"
    file.write_text(as_yaml(settings), encoding="utf-8")
    assert TrainSettings.of(yaml.load(file.read_text(encoding="utf-8"), yaml_loader)) == settings
    again = run("train", "-c", file, "--print-config")
    assert again.out == file.read_text(encoding="utf-8")


def test_one_hf_dataset_entry_is_a_list_of_one_as_in_mlx_lm():
    assert TrainSettings.of({"hf_dataset": {"path": "x"}}).hf_dataset == ({"path": "x"},)
    assert "hf_dataset" in refused(hf_dataset="x")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": "d", "task": "textualized-tree"}, "found `data` and `task`, expected one of"),
        ({"data": "d", "curriculum": ["small"]}, "`curriculum` is for `task` textualized-tree"),
        ({"k": 1, "encoder_warmup": 2}, "leave `encoder_warmup` out"),
        ({"teacher_top_k": 3}, "need `teacher`"),
        ({"teacher": "base", "teacher_file": "f"}, "`teacher_file` needs `teacher_top_k`"),
        (
            {"teacher": "base", "teacher_answers": True, "task": "textualized-tree"},
            "`teacher_file` and `teacher_answers` need `data`",
        ),
        ({"resume": True, "force": True}, "`resume` and `force` exclude each other"),
        ({"lora_parameters": {"keys": "q_proj"}}, "expected a list of module names"),
        ({"lora_parameters": {"dropout": 1}}, "lora_parameters.dropout is 1, expected"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings, said):
    text = refused(**settings)
    assert said in text
    assert len(text.splitlines()) == 1


def test_sizes_are_those_of_mlx_lm():
    for text in ("0", "17", "4GB", "4gb", "1.5G", "2.3GB", "300M", "300 MB"):
        assert TrainSettings(clear_cache_threshold=text).cache_limit == _parse_size(text)


def test_lora_parameters_that_are_not_given_are_the_papers():
    wanted = {"rank": 8, "scale": 4.0, "dropout": 0.05, "keys": None}
    assert TrainSettings(lora_parameters={"rank": 8}).lora() == wanted


def test_a_run_begins_again_from_all_settings_but_those_of_the_output():
    settings = TrainSettings(adapter_path="x", force=True, report_to="wandb", iters=3)
    assert set(FIELDS) - set(settings.saved()) == OUTPUTS
    assert TrainSettings.of(settings.saved(), {"adapter_path": "x"}).saved() == settings.saved()


def test_what_a_resumed_run_may_change_is_named_here():
    """Places, lengths and outputs; whatever changes the arithmetic is fixed."""
    assert set(FIELDS) - set(TrainSettings().fixed()) - OUTPUTS == {
        *("model", "data", "file", "init_from", "teacher_file", "trust_remote_code"),
        *("template_date", "iters", "clear_cache_threshold"),
    }


def test_a_setting_of_yaml_alone_is_named_in_an_error(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("lora_parameters: 3\nlr_schedule: x\n")
    said = ("`lora_parameters` is 3", "`lr_schedule` is 'x', expected a mapping")
    assert_one_error(run("train", "-c", file), 2, *said)
