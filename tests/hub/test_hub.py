"""Models, adapters, checkpoints and data by hub repo id, from a hub that can fail on demand."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path

import pytest

from kmerge_mlx.adapters.folder import adapter_folder
from kmerge_mlx.errors import AdapterError
from kmerge_mlx.hub.fetch import one_version
from tests.cli_runner import command, environment, run, run_process
from tests.hub_runs import assert_said, settings, using
from tests.hub_server import Repo, running_hub
from tests.saved_adapters import saved

TREE = "Tree: JN\n+WO\n++UP\n++JG\n"


@pytest.fixture
def hub(checkpoint_path, base_path, adapter_path):
    with running_hub(ckpt=checkpoint_path, base=base_path, adapter=adapter_path) as hub:
        yield hub


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def online(hub, tmp_path):
    """Lets this process use the hub, with a fresh cache."""
    with using(hub, tmp_path / "home"):
        yield tmp_path / "home"


def test_repo_ids_with_revisions_do_for_convert_and_generate(hub, work, tmp_path):
    hub.repos["user/base"].refs["v1"] = hub.repos["user/base"].refs["main"]
    hub.repos["user/base"].commit({"config.json": b"{}"})  # what came later is no model
    at = {"cwd": work} | settings(hub, tmp_path / "home")
    result = run_process("convert", "user/ckpt@main", "adapter", "--model", "user/base@v1", **at)
    assert (result.code, result.out) == (0, ""), result.err
    assert result.err == "adapter: K = 4, D = 64, 50 tensors, 0.9 MB, base user/base@v1\n"

    # The recorded base, its revision included, is the default.
    (work / "prompt.txt").write_text(TREE)
    result = run_process("generate", "--adapter-path", "adapter", "prompt.txt", "--json", **at)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["text"] == "false"


def test_an_adapter_by_repo_id_gives_the_text_of_the_local_one(
    hub, work, online, base_path, adapter_path
):
    (work / "prompt.txt").write_text(TREE)
    args = ("generate", "--model", "user/base", "prompt.txt", "--adapter-path")
    local, ours = (run(*args, path) for path in (adapter_path, "user/adapter@main"))
    assert (ours.code, ours.out) == (0, local.out)
    assert ours.out == "false\n"
    (work / "test.jsonl").write_text(json.dumps({"prompt": TREE, "completion": "false"}) + "\n")
    args = ("--model", "user/base", "--adapter-path", "user/adapter")
    found = run("evaluate", *args, "--data", ".", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["settings"]["adapter_path"] == "user/adapter"
    info = json.loads(run("info", "user/adapter", "--json").out)
    assert (info["kind"], info["path"]) == ("adapter", "user/adapter")
    assert json.loads(run("info", "user/base", "--json").out)["kind"] == "base model"
    assert json.loads(run("info", "user/ckpt", "--json").out)["kind"] == "checkpoint"
    weights = Repo.of(base_path).files()["model.safetensors"]
    cached = [p for p in online.rglob("model.safetensors") if p.read_bytes() == weights]
    assert len(cached) == 1


def test_a_repo_of_something_else_is_one_line(hub, work, online):
    hub.repos["user/other"] = Repo()
    hub.repos["user/other"].commit({"notes.txt": b"hello"})
    assert_said(
        run("info", "user/other"), "user/other holds no adapter, no checkpoint and no base model"
    )
    (work / "prompt.txt").write_text(TREE)
    assert_said(
        run("generate", "--adapter-path", "user/other", "prompt.txt"),
        "user/other is no adapter folder: merge_config.json is missing",
    )


def test_a_folder_of_that_name_comes_before_the_hub(hub, work, online, adapter_path):
    (work / "user").mkdir()
    (work / "user" / "adapter@main").symlink_to(adapter_path)
    assert adapter_folder("user/adapter@main") == Path("user/adapter@main")
    assert hub.requests == []


def test_of_several_adapters_only_the_chosen_one_is_fetched(hub, online, tmp_path):
    for k in (2, 4):
        saved(tmp_path / "many" / f"k{k}", k=k)
    (tmp_path / "many" / "k4" / "notes.txt").write_text("mine")
    hub.repos["user/many"] = Repo.of(tmp_path / "many")
    with pytest.raises(AdapterError, match="user/many holds adapters for K = 2, 4: choose one"):
        adapter_folder("user/many")
    folder = adapter_folder("user/many", 4)
    assert len(list(folder.iterdir())) == 4
    assert not (folder.parent / "k2" / "adapters.safetensors").exists()


def test_within_a_command_a_name_stays_the_version_it_was(hub, online, tmp_path):
    hub.repos["user/one"] = repo = Repo.of(saved(tmp_path / "one"))
    with one_version():
        before = adapter_folder("user/one")
        repo.commit({"README.md": b"all gone"})
        hub.requests.clear()
        assert adapter_folder("user/one") == before
        assert hub.requests == []  # and the hub is asked once
    with pytest.raises(AdapterError, match=r"user/one is no adapter folder: merge_config\.json"):
        adapter_folder("user/one")


FAULTS = {
    "missing": (
        lambda hub: hub.repos.pop("user/ckpt"),
        "user/ckpt is no folder here, and the hub has no such repo, or a private one: check the "
        "name, or `hf auth login`",
    ),
    "gated": (
        lambda hub: hub.locked.add("user/ckpt"),
        "user/ckpt is gated: accept its terms on its hub page, then `hf auth login`",
    ),
    "401": (
        lambda hub: hub.refuse.update(info=401),
        "user/ckpt is no folder here, and the hub asks for another token (401): `hf auth login`, "
        "or set HF_TOKEN",
    ),
    "403": (
        lambda hub: hub.refuse.update(info=403),
        "user/ckpt is no folder here, and the token may not read it (403): give one that may with "
        "`hf auth login`",
    ),
    "429": (
        lambda hub: hub.refuse.update(info=429),
        "user/ckpt is no folder here, and the hub has too many requests (429): try again in a "
        "second",
    ),
    "500": (
        lambda hub: hub.refuse.update(info=500),
        "user/ckpt is no folder here, and the hub cannot answer now (500): try again in a while",
    ),
    "corrupt": (
        lambda hub: hub.corrupt.update(["encoder.pth", "adapter_config.json"]),
        "user/ckpt: adapter_config.json, encoder.pth did not come as the hub has it (its checksum "
        "differs) and was thrown away: try again",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_hub_is_one_line_and_a_second_try_works(hub, work, online, fault):
    repo, (make, line) = hub.repos["user/ckpt"], FAULTS[fault]
    make(hub)
    assert_said(run("convert", "user/ckpt", "adapter"), line)
    assert list(work.iterdir()) == []
    for faults in (hub.locked, hub.refuse, hub.corrupt):
        faults.clear()
    hub.repos["user/ckpt"] = repo
    result = run("convert", "user/ckpt", "adapter", "--model", "user/base")
    assert result.code == 0, result.err
    assert (work / "adapter" / "merge_config.json").is_file()


def test_a_connection_cut_in_mid_file_is_one_line_and_a_second_try_goes_on(hub, work, tmp_path):
    hub.cut.add("encoder.pth")
    at = {"cwd": work} | settings(hub, tmp_path / "home")
    line = "user/ckpt is no folder here, and the connection to the hub broke: try again"
    assert_said(run_process("convert", "user/ckpt", "adapter", **at), line)
    assert list(work.iterdir()) == []
    hub.cut.clear()
    hub.requests.clear()
    with using(hub, tmp_path / "home"):
        assert run("convert", "user/ckpt", "adapter").code == 0
    asked = [r.rsplit("/", 1)[-1] for r in hub.requests if r.startswith("HEAD user/ckpt")]
    assert asked == ["encoder.pth"]  # what came whole is kept


def test_a_revision_that_is_not_there_is_one_line(work, online):
    line = "user/ckpt has no revision v2: give a branch, tag or commit"
    assert_said(run("convert", "user/ckpt@v2", "adapter"), line)
    line = "user/ckpt@: '' is no revision, expected a branch, tag or commit"
    assert_said(run("convert", "user/ckpt@", "adapter"), line)


def test_a_private_repo_needs_a_token(hub, work, tmp_path, online):
    hub.repos["user/base"].private = True
    hub.tokens["hf_good"] = "read"
    (work / "prompt.txt").write_text(TREE)
    args = ("generate", "--model", "user/base", "prompt.txt", "--adapter-path", "user/adapter")
    result = run(*args)
    assert result.err.startswith("error: user/base is no folder here, and the hub has no such repo")
    with using(hub, tmp_path / "home", token="hf_good"):
        assert run(*args).out == "false\n"
    with using(hub, tmp_path / "other", token="hf_bad"):
        assert "the hub asks for another token (401): `hf auth login`" in run(*args).err


def test_offline_the_cache_does_and_the_network_is_left_alone(hub, work, tmp_path, online):
    args = ("convert", "user/ckpt", "adapter")
    with using(hub, tmp_path / "home", HF_HUB_OFFLINE=True):
        line = (
            "user/ckpt is no folder here and not in the cache, or not all of it, and "
            "HF_HUB_OFFLINE is set, so the hub is not asked: unset it"
        )
        assert_said(run(*args), line)
        assert hub.requests == []
    hub.corrupt.add("encoder.pth")
    assert run(*args).code == 1
    with using(hub, tmp_path / "home", HF_HUB_OFFLINE=True):
        assert_said(run(*args), line)  # what is there of it is not taken for the whole
    hub.corrupt.clear()
    assert run(*args).code == 0
    hub.requests.clear()
    with using(hub, tmp_path / "home", HF_HUB_OFFLINE=True):
        assert run(*args, "--force").code == 0
    assert hub.requests == []


def test_without_a_network_that_is_one_line(hub, work, tmp_path):
    hub.url = "http://127.0.0.1:9"  # the port of a service that nobody runs
    with using(hub, tmp_path / "home"):
        line = (
            "user/ckpt is no folder here and not in the cache, or not all of it, and the hub "
            "cannot be reached: check the connection"
        )
        assert_said(run("convert", "user/ckpt", "adapter"), line)


def test_a_file_too_large_for_the_disk_is_one_line_and_nothing_torn(hub, work, tmp_path):
    # A limit on the size of files stands for a full disk: the write fails in the same place.
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        command("convert", "user/ckpt", "adapter"),
        env=environment(**settings(hub, tmp_path / "home")),
        cwd=work,
        capture_output=True,
        encoding="utf-8",
        preexec_fn=small_disk,
        timeout=120,
    )
    said = "error: user/ckpt is no folder here, and cannot write the hub's cache: File too large\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    assert not list(work.iterdir())
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    with using(hub, tmp_path / "home"):
        assert run("convert", "user/ckpt", "adapter").code == 0
