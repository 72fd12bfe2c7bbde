"""``kmerge-mlx upload``: what goes up and what does not, the card, and a hub that refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from kmerge_mlx.adapters.folder import FILES, load_adapter
from tests.cli_runner import assert_one_error, change_json, run
from tests.hub_server import assert_said, running_hub, using
from tests.saved_adapters import saved

TREE = "Tree: JN\n+WO\n++UP\n++JG\n"
ONE = ("upload", "adapter", "me/one", "--license", "mit")


@pytest.fixture
def hub(base_path):
    with running_hub(base=base_path) as hub:
        hub.tokens |= {"hf_write": "write", "hf_read": "read"}
        yield hub


@pytest.fixture
def work(tmp_path, monkeypatch, adapter_path, base_path) -> Path:
    """A working directory with the fixture's adapter, made on a local base, and a prompt."""
    work = tmp_path / "work"
    shutil.copytree(adapter_path, work / "adapter")
    name_base(work / "adapter", "user/base@main")
    change_json(work / "adapter" / "merge_config.json", provenance={"data": "trees"})
    (work / "prompt.txt").write_text(TREE)
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def online(hub, tmp_path):
    """Lets this process use the hub, with a fresh cache and a token that may write."""
    with using(hub, tmp_path / "home", token="hf_write"):
        yield


def name_base(adapter: Path, name: str | None) -> None:
    entry = json.loads((adapter / "merge_config.json").read_text())["base_model"]
    change_json(adapter / "merge_config.json", base_model=entry | {"id": name})
    change_json(adapter / "adapter_config.json", model=name)


def test_an_uploaded_adapter_reads_from_another_machine_as_it_does_here(
    hub, work, online, tmp_path
):
    (work / "adapter" / "training").mkdir()
    (work / "adapter" / "training" / "state.json").write_text("{}")
    result = run(*ONE, "--private")
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith(f"{hub.url}/me/one/commit/")
    assert result.err.endswith(": 5 files, 0.9 MB\n")
    repo = hub.repos["me/one"]
    assert set(repo.files()) == {".gitattributes", "README.md", *FILES}  # and nothing else
    assert len([r for r in hub.requests if "/commit/" in r]) == 1
    assert repo.private

    here = run("generate", "--adapter-path", "adapter", "prompt.txt").out
    args = ("generate", "--adapter-path", "me/one", "prompt.txt")
    with using(hub, tmp_path / "other", token="hf_read"):
        there = run(*args)
    assert (there.code, there.out) == (0, here)
    assert here == "false\n"
    with using(hub, tmp_path / "third"):
        assert_one_error(run(*args), 1, "or a private one")


def test_a_folder_of_several_goes_up_as_k_and_one_may_be_chosen(hub, work, online):
    for k in (2, 4):
        saved(work / "many" / f"mine{k}", k=k)
        name_base(work / "many" / f"mine{k}", "bundled")
    many = ("upload", "many", "me/many", "--license", "mit")
    for args, ks in ((("--k", 4), (4,)), ((), (2, 4))):
        assert run(*many, *args).code == 0
        names = {name for name in hub.repos["me/many"].files() if "/" in name}
        assert names == {f"k{k}/{name}" for k in ks for name in FILES}
    refused = run(*many, "--k", 3)
    assert_one_error(refused, 1, "many holds no adapter for --k 3: it has K = 2, 4")


def test_a_dry_run_asks_nobody_and_prints_the_card(hub, work, online):
    result = run(*ONE, "--dry-run")
    assert (result.code, hub.requests) == (0, [])
    assert ModelCard(result.out).data.license == "mit"
    *lines, last = result.err.splitlines()
    assert last == "Nothing was uploaded: without --dry-run, this goes to me/one"
    names = [line.split()[0] for line in lines]
    assert names == ["README.md", *sorted(FILES, key=FILES.index)]
    assert run(*ONE).code == 0
    assert hub.repos["me/one"].files()["README.md"].decode() == result.out


def test_the_cards_metadata_is_what_the_hub_reads(work):
    report = evaluation(work / "e.json", k=4)
    args = ("--data", "some/trees", "--data", "Trees drawn by hand.", "--metrics", report)
    text = run(*ONE, "--dry-run", *args).out
    read = ModelCard(text).data  # the hub client's reader
    kind = (read.license, read.library_name, read.pipeline_tag)
    assert kind == ("mit", "mlx", "text-generation")
    assert (read.base_model, read.datasets) == ("user/base", ["some/trees"])
    assert {"mlx", "k-token-merging", "lora"} <= set(read.tags)
    found = {(r.metric_type, r.metric_value, r.dataset_type) for r in read.eval_results}
    assert found == {("accuracy", 0.75, "textualized-tree")}  # not the baseline's, no NaN
    for part in (
        "https://arxiv.org/abs/2604.15153",
        "(https://huggingface.co/user/base) (revision `main`)",
        "kmerge-mlx generate --adapter-path me/one --k 4 prompt.txt",
        'load("user/base@main", "me/one", 4)',
        "- Trees drawn by hand.",
        "| K=4 | 4.00x | 75.00% (50.0-90.0) |",
        "| uncompressed | 1.00x | 90.00% (70.0-99.0) |",
    ):
        assert part in text


def evaluation(path: Path, k: int, **settings: object) -> Path:
    """What ``evaluate --json`` prints, cut down."""

    def row(method: str, k: int, label: str, *values: float) -> dict:
        accuracy = dict(zip(("value", "low", "high"), values, strict=True))
        scores = {"relationship": {"accuracy": accuracy, "perplexity": {"value": None}}}
        sizes = {"prompt_tokens": 80, "positions": 80 // k, "compression_ratio": float(k)}
        return {"method": method, "k": k, "label": label, **sizes, "scores": scores}

    asked = {"task": "textualized-tree", "data": None, "split": "test", "data_seed": 42}
    rows = [
        row("uncompressed", 1, "uncompressed", 0.9, 0.7, 0.99),
        row("merged", k, f"K={k}", 0.75, 0.5, 0.9),
        {"method": "truncate", "k": k, "label": "cut", "refused": "too long"},
    ]
    groups = {"relationship": {"questions": 20, "labels": ["true", "false"]}}
    report = {"kmerge_mlx": "0.1", "device": "cpu", "settings": asked | settings}
    path.write_text(json.dumps(report | {"groups": groups, "rows": rows}))
    return path


def test_metrics_of_something_else_are_refused_or_said(work, tmp_path):
    assert_said(
        run(*ONE, "--dry-run", "--metrics", evaluation(Path("e.json"), k=2)),
        "e.json measured K = 1, 2, what goes up has K = 4",
    )
    Path("bad.json").write_text("[]")
    said = "is not what `kmerge-mlx evaluate --json`"
    assert_one_error(run(*ONE, "--dry-run", "--metrics", "bad.json"), 1, said)
    other = saved(tmp_path / "other")
    report = evaluation(Path("e.json"), k=4, adapter_path=str(other))
    note = f"note: e.json measured {other}, not adapter\n"
    assert note in run(*ONE, "--dry-run", "--metrics", report).err


def test_a_local_base_needs_its_name_on_the_hub(hub, work, online, base_path):
    name_base(work / "adapter", str(base_path))
    said = f"adapter was made on {base_path}, which is not a hub repo id: give the base's, as "
    assert_said(run(*ONE), f"{said}--base-model user/name")
    name_base(work / "adapter", None)
    assert_one_error(run(*ONE), 1, "adapter does not name its base model: give --base-model")
    assert hub.requests == []
    name_base(work / "adapter", str(base_path))
    result = run(*ONE, "--base-model", "user/base")
    changed = f"note: merge_config.json: base_model.id is {base_path}, goes up as user/base\n"
    assert changed in result.err
    everything = b"".join(hub.repos["me/one"].files().values())
    assert str(base_path).encode() not in everything
    configs = (hub.repos["me/one"].files()[f"{n}_config.json"] for n in ("merge", "adapter"))
    merge, tuning = map(json.loads, configs)
    assert (merge["base_model"]["id"], tuning["model"]) == ("user/base", "user/base")
    assert load_adapter(work / "adapter").merge.base.id == str(base_path)  # left as it was


def test_no_path_of_this_machine_goes_up_unnoticed(hub, work, online):
    provenance = {
        "source": "/Users/jane doe/runs/best",
        "metrics": "left out: cannot read /home/jane/x/metrics.json: gone",
        "data": ["~/jane/data", "../jane/more", "user/data", "./data"],
        "see": "https://hub/a/b and 3/4 and/or (/home/jane/notes.md)",
        "/home/jane/scores": {"file:///home/jane/a.json": 0.5},
    }
    change_json(work / "adapter" / "merge_config.json", provenance=provenance)
    result = run(*ONE, "--data", "Rows of /home/jane/rows.jsonl.", "--data", "user/data")
    files = hub.repos["me/one"].files()
    assert json.loads(files["merge_config.json"])["provenance"] == {
        "source": "best",
        "metrics": "left out: cannot read metrics.json: gone",
        "data": ["data", "more", "user/data", "./data"],
        "see": "https://hub/a/b and 3/4 and/or (notes.md)",
        "scores": {"a.json": 0.5},
    }
    assert b"jane" not in b"".join(files.values())
    assert b"- Rows of rows.jsonl.\n" in files["README.md"]
    notes = [line for line in result.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 7
    assert "merge_config.json: provenance.source is /Users/jane doe/runs/best" in result.err


def test_a_base_that_others_cannot_have_or_that_does_not_fit_is_refused(hub, work, online):
    name_base(work / "adapter", "models/local")
    assert_one_error(
        run(*ONE),
        1,
        "the adapter goes up as made on models/local, which cannot be fetched: models/local is",
        "--base-model names another",
    )
    config = json.loads(hub.repos["user/base"].files()["config.json"])
    hub.repos["user/base"].commit({"config.json": json.dumps(config | {"vocab_size": 9}).encode()})
    refused = run(*ONE, "--base-model", "user/base")
    assert_one_error(refused, 1, "user/base is not the base of this adapter: vocab_size is 9")
    assert "me/one" not in hub.repos


def test_a_repo_in_which_an_adapter_would_not_be_found_is_refused(hub, work, online):
    saved(work / "many" / "k4", k=4)
    name_base(work / "many" / "k4", "bundled")
    assert run(*ONE).code == 0
    before = hub.repos["me/one"].files()
    refused = run("upload", "many", "me/one", "--license", "mit")
    assert_one_error(refused, 1, "me/one holds merge_config.json: with the adapter that is to go")
    assert run("upload", "many", "me/many", "--license", "mit").code == 0
    refused = run("upload", "adapter", "me/many", "--license", "mit")
    assert_one_error(refused, 1, "me/many holds k4/merge_config.json: with the adapter")
    assert hub.repos["me/one"].files() == before


def test_private_means_private(hub, work, online):
    assert run(*ONE).code == 0
    before = hub.repos["me/one"].refs["main"]
    said = "me/one is there and public: leave --private out, or make it private"
    assert_said(run(*ONE, "--private", "--data", "x"), said)
    assert hub.repos["me/one"].refs["main"] == before


def test_without_a_token_that_may_nothing_is_made(hub, work, tmp_path):
    name_base(work / "adapter", "bundled")
    for token, said in (
        ("hf_bad", "me/one: the hub asks for another token (401)"),
        ("hf_read", "me/one: the token may not write it (403): give one that may with `hf auth"),
    ):
        with using(hub, tmp_path / token, token=token):
            assert_one_error(run(*ONE), 1, said)
    assert "me/one" not in hub.repos
