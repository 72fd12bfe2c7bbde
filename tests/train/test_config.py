"""The settings of a run: mlx-lm's names and defaults, three layers, a line for each mistake."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, build_parser, yaml_loader
from mlx_lm.utils import _parse_size

from kmerge_mlx.cli.train import _as_yaml
from kmerge_mlx.errors import TrainError
from kmerge_mlx.settings import SIZE, option_of, parse_size, shown
from kmerge_mlx.train.settings import ELSEWHERE, TrainSettings
from tests.cli_runner import assert_one_error, run

# What belongs to the method, and so has the paper's default or must be given.
OURS = {
    *("model", "data", "num_layers", "lora_parameters", "optimizer", "learning_rate"),
    "optimizer_config",  # the same: no arguments for any optimizer
}
FIELDS = {field.name: field for field in fields(TrainSettings)}
WRONG = {
    int: ["x", 1.5, True, [1], {}],
    float: ["x", True, float("nan"), float("inf"), [1.0]],
    bool: ["true", 1, 0, []],
    str: [1, True, ["x"], 1.5],
    dict: ["x", 3, [1]],
    list: ["x", 3, {"a": 1}],
    SIZE: ["x", "4XB", -1, 1.5, True, "", "GB"],
}


def printed(*args: object, settings: str | None = None, folder=None) -> dict[str, object]:
    """The settings that a command line comes to."""
    if settings is not None:
        (folder / "config.yaml").write_text(settings)
        args = (*args, "-c", folder / "config.yaml")
    result = run("train", *args, "--print-config")
    assert (result.code, result.err) == (0, "")
    return yaml.load(result.out, yaml_loader)


def refused(**settings: object) -> str:
    with pytest.raises(TrainError) as caught:
        TrainSettings.of(settings)
    return str(caught.value)


def test_defaults_are_mlx_lms_but_for_those_that_belong_to_the_method():
    ours = {name: getattr(TrainSettings(), name) for name in FIELDS}
    shared = set(ours) & set(CONFIG_DEFAULTS)
    assert shared >= OURS
    differ = {name for name in shared if ours[name] != CONFIG_DEFAULTS[name]}
    assert differ == OURS


def test_every_key_of_mlx_lm_has_a_place_or_an_explanation():
    assert set(CONFIG_DEFAULTS) - set(FIELDS) == set(ELSEWHERE)


def test_every_flag_of_mlx_lm_is_one_here_or_explained():
    theirs = {action.dest for action in build_parser()._actions} - {"help"}
    flags = {name for name, field in FIELDS.items() if not option_of(field).yaml_only}
    assert theirs - flags - set(ELSEWHERE) == set()


def test_every_setting_has_a_flag_in_the_help_or_is_named_as_one_of_the_file():
    text = " ".join(run("train", "--help").out.split())
    for name, field in FIELDS.items():
        if not option_of(field).yaml_only:
            assert f" {shown(field)} " in text or f" {shown(field)}, " in text, name
        else:
            assert name in text or name.endswith("_feature") or name == "text_split", name
            assert f"--{name.replace('_', '-')}" not in text


def test_the_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from kmerge_mlx.cli import main\n"
        "sys.argv = ['kmerge-mlx', 'train', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'numpy', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_flag_beats_the_file_and_the_file_beats_the_default(tmp_path):
    settings = "iters: 7\nbatch_size: 3\nk: 2\nlora_parameters: {rank: 2}\n"
    found = printed("--iters", 9, "--merge-factor", 3, settings=settings, folder=tmp_path)
    assert (found["iters"], found["k"]) == (9, 3)
    assert found["batch_size"] == 3
    assert found["save_every"] == 100
    assert found["lora_parameters"] == {"rank": 2}


def test_lora_parameters_that_are_not_given_are_the_papers():
    assert TrainSettings().lora() == {"rank": 4, "scale": 4.0, "dropout": 0.05, "keys": None}
    config = TrainSettings(lora_parameters={"rank": 8})
    assert config.lora() == {"rank": 8, "scale": 4.0, "dropout": 0.05, "keys": None}


def test_null_in_the_file_leaves_a_setting_as_it_was(tmp_path):
    assert printed(settings="iters: null\nteacher: null\n", folder=tmp_path) == printed()


def test_an_empty_file_is_no_setting(tmp_path):
    assert printed(settings="# nothing\n", folder=tmp_path) == printed()


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-05"])
def test_scientific_notation_is_a_number_as_in_mlx_lm(tmp_path, text):
    found = printed(settings=f"learning_rate: {text}\n", folder=tmp_path)
    assert found["learning_rate"] == 1e-5


def test_printed_settings_read_back_are_the_same_settings(tmp_path):
    config = TrainSettings(
        model="1e5",  # text that YAML would take for a number, a date, nothing, a truth
        data=None,
        task="textualized-tree",
        project_name="2020-01-01",
        category="null",
        language="on",
        report_to="wandb",
        adapter_path="a folder/ünï: # 'quoted'",
        curriculum=["small", {"stage": "xsmall", "threshold": 0.5}],
        lora_parameters={"rank": 2, "scale": 1e-5, "keys": ["self_attn.q_proj"]},
        optimizer_config={"adamw": {"betas": [0.9, 0.98]}},
        lr_schedule={"name": "cosine_decay", "arguments": [1e-5, 10], "warmup": 3},
        clear_cache_threshold="4GB",
        learning_rate=3e-7,
        encoder_factor=0.5,
        seed=2**62,
        skip_bad=True,
    )
    file = tmp_path / "printed.yaml"
    file.write_text(_as_yaml(config), encoding="utf-8")
    assert TrainSettings.of(yaml.load(file.read_text(encoding="utf-8"), yaml_loader)) == config
    again = run("train", "-c", file, "--print-config")
    assert again.out == file.read_text(encoding="utf-8")


def test_every_setting_is_printed():
    assert list(printed()) == list(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_the_wrong_type_is_one_line_that_names_the_setting(name):
    option = option_of(FIELDS[name])
    for value in WRONG[option.kind]:
        if name == "hf_dataset" and isinstance(value, dict):
            continue  # one entry instead of a list of them, as in mlx-lm
        text = refused(**{name: value})
        assert text.startswith(f"train: {shown(FIELDS[name])} is "), (value, text)
        assert "expected" in text
        assert len(text.splitlines()) == 1
        assert len(text) < 200


@pytest.mark.parametrize(
    "name", [n for n, f in FIELDS.items() if option_of(f).low is not None or option_of(f).choices]
)
def test_a_value_out_of_range_is_one_line_that_names_the_setting(name):
    option = option_of(FIELDS[name])
    values = ["dora"] if option.choices else [option.low - 1]
    values += [] if option.high is None else [option.high + 1]
    for value in values:
        text = refused(**{name: value})
        assert text.startswith(f"train: {shown(FIELDS[name])} is "), text
        assert "expected" in text
        assert len(text.splitlines()) == 1


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if option_of(f).kind is int])
def test_a_whole_number_that_no_array_holds_is_refused(name):
    assert f"train: {shown(FIELDS[name])} is " in refused(**{name: 2**63})


def test_dora_is_refused_as_a_flag_and_in_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("fine_tune_type: dora\n")
    result = run("train", "-c", tmp_path / "c.yaml", "--print-config")
    assert_one_error(result, 1, "--fine-tune-type is 'dora', expected one of lora, full")
    result = run("train", "--fine-tune-type", "dora", "--print-config")
    assert_one_error(result, 1, "--fine-tune-type is 'dora', expected one of lora, full")


def test_an_unknown_key_is_named_with_what_is_near_it():
    assert refused(learning_rates=1) == (
        "train: unknown setting 'learning_rates', did you mean learning_rate?"
    )
    assert refused(**{"max-seq-length": 1}).endswith("did you mean max_seq_length?")
    assert refused(zzz=1) == "train: unknown setting 'zzz'"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_key_of_mlx_lm_that_has_no_place_here_is_explained(name):
    text = refused(**{name: CONFIG_DEFAULTS[name]})
    assert text == f"train: {name}: {ELSEWHERE[name]}"


def test_everything_wrong_is_listed_at_once():
    text = refused(k=0, iters="x", optimizer="lion")
    assert text.splitlines() == [
        "train: 3 problems",
        "  - --k is 0, expected at least 1",
        "  - --optimizer is 'lion', expected one of adam, adamw, muon, sgd, adafactor",
        "  - --iters is 'x', expected a whole number",
    ]
    assert refused(foo=1, bar=2).splitlines()[0] == "train: 2 problems"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": "d", "task": "textualized-tree"}, "found data and task, expected one of --data"),
        ({"data": "d", "hf_dataset": {"path": "x"}}, "found data and hf_dataset"),
        ({"data": "d", "curriculum": ["small"]}, "--curriculum is for --task textualized-tree"),
        ({"k": 1, "encoder_context": 2}, "need --k 2 or more"),
        ({"k": 1, "encoder_warmup": 2}, "need --k 2 or more"),
        ({"k": 1, "encoder_factor": 1.0}, "need --k 2 or more"),
        ({"teacher_top_k": 3}, "need --teacher base"),
        ({"teacher_answers": True}, "need --teacher base"),
        ({"teacher": "base", "teacher_file": "f"}, "--teacher-file needs --teacher-top-k"),
        (
            {"teacher": "base", "teacher_answers": True, "task": "textualized-tree"},
            "--teacher-file and --teacher-answers need --data",
        ),
        ({"resume": True, "force": True}, "--resume and --force exclude each other"),
        ({"report_to": "wandb,nope"}, "--report-to is 'wandb,nope', expected wandb, swanlab"),
        ({"report_to": ","}, "--report-to is ','"),
        (
            {"lora_parameters": {"keys": "self_attn.q_proj"}},
            "lora_parameters.keys is 'self_attn.q_proj', expected a list of module names",
        ),
        ({"k": 1, "lora_parameters": {"keys": []}}, "is empty: nothing is left to train"),
        ({"lora_parameters": {"keys": [1]}}, "lora_parameters.keys is [1]"),
        ({"lora_parameters": {"dropout": 1}}, "lora_parameters.dropout is 1, expected"),
        ({"lora_parameters": {"dropout": "x"}}, "lora_parameters.dropout is 'x', expected"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings, said):
    text = refused(**settings)
    assert said in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("iters: [", "is not YAML"),
        ("- iters\n- 3\n", "holds no settings, expected lines of `name: value`"),
        ("just words\n", "holds no settings"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("? [a]\n: 3\n", "is not YAML"),
        ("5: 3\n", "unknown setting '5'"),
        ("iters: " + "9" * 5000 + "\n", "is not YAML"),
        ("{" * 50_000, "is not YAML"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    assert_one_error(run("train", "-c", tmp_path / "c.yaml", "--print-config"), 1, said)


def test_a_config_file_that_cannot_be_read_is_one_line(tmp_path):
    result = run("train", "-c", tmp_path / "none.yaml")
    assert_one_error(result, 1, "cannot read --config", "No such file")
    assert_one_error(run("train", "-c", tmp_path), 1, "cannot read --config", "Is a directory")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert_one_error(run("train", "-c", tmp_path / "c.yaml"), 1, "is not YAML")


@pytest.mark.parametrize("text", ["0", "17", "4GB", "4gb", "1.5G", "2.3GB", "300M", "300 MB"])
def test_sizes_are_those_of_mlx_lm(text):
    assert parse_size(text) == _parse_size(text)
    assert TrainSettings(clear_cache_threshold=text).cache_limit == _parse_size(text)


def test_more_units_than_mlx_lms_are_powers_of_a_thousand():
    assert [parse_size(f"2{unit}") for unit in ("KB", "TB")] == [2_000, 2 * 10**12]
    assert TrainSettings(clear_cache_threshold=5).cache_limit == 5


def test_two_configs_share_no_default():
    TrainSettings().optimizer_config["adam"] = {}
    TrainSettings().curriculum.append("small")
    assert (TrainSettings().optimizer_config, TrainSettings().curriculum) == ({}, [])


def test_a_run_begins_again_from_all_settings_but_those_of_the_output():
    config = TrainSettings(adapter_path="x", force=True, report_to="wandb", iters=3)
    settings = config.settings()
    outputs = {"adapter_path", "resume", "force", "plot", "report_to", "project_name"}
    assert set(FIELDS) - set(settings) == outputs
    assert TrainSettings.of(settings, {"adapter_path": "x"}).settings() == settings


def test_what_a_resumed_run_may_change_is_named_here():
    """Places, lengths and outputs; whatever changes the arithmetic is fixed."""
    free = {name for name, field in FIELDS.items() if not option_of(field).fixed}
    outputs = {"adapter_path", "resume", "force", "plot", "report_to", "project_name"}
    assert free - outputs == {
        *("model", "data", "file", "init_from", "teacher_file", "trust_remote_code"),
        *("iters", "clear_cache_threshold"),
    }
    assert set(TrainSettings().fixed()) == {shown(FIELDS[name]) for name in set(FIELDS) - free}
