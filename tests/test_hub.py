"""Models, adapters, checkpoints and data by hub repo id, from a hub that can fail on demand."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id

from kmerge_mlx.adapters.folder import look_up
from kmerge_mlx.errors import AdapterError, KMergeError, ModelError
from kmerge_mlx.hub import RepoName, fetch, is_namespaced, one_version, parse
from tests.cli_runner import command, environment, run
from tests.hub_server import Repo, assert_said, running_hub, settings, using
from tests.saved_adapters import saved

TAKEN = "user/ckpt is not a folder here, so it was taken for a hub repo"
TREE = "Tree: JN\n+WO\n++UP\n++JG\n"


@pytest.fixture
def hub(checkpoint_path, base_path, adapter_path):
    with running_hub(ckpt=checkpoint_path, base=base_path, adapter=adapter_path) as hub:
        yield hub


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A working directory that holds a prompt."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "prompt.txt").write_text(TREE)
    return tmp_path / "work"


@pytest.fixture
def online(hub, tmp_path):
    """Lets this process use the hub, with a fresh cache."""
    with using(hub, tmp_path / "home"):
        yield tmp_path / "home"


def adapter_folder(name: str, k: int | None = None) -> Path:
    return look_up(name).choose(k)[0]


def refused(name: str = "user/ckpt") -> str:
    with pytest.raises(KMergeError) as caught:
        fetch(name, ["*"], KMergeError)
    return str(caught.value)


# ---- names ----


def test_a_name_holds_a_revision_after_its_at():
    for text, found in (
        ("user/name", RepoName("user/name")),
        ("gpt2", RepoName("gpt2")),
        ("user/name@v1.0", RepoName("user/name", "v1.0")),
        ("user/name@refs/pr/3", RepoName("user/name", "refs/pr/3")),
        ("user/na.me-2@" + "c" * 40, RepoName("user/na.me-2", "c" * 40)),
    ):
        assert parse(text, ModelError) == found
        assert str(found) == text
        validate_repo_id(found.id)  # the hub client's own rule
    assert parse("user/name", ModelError, "v1") == RepoName("user/name", "v1")
    assert parse("user/name@v1", ModelError, "v1") == RepoName("user/name", "v1")
    with pytest.raises(ModelError, match="names another revision than 'v2': give one of them"):
        parse("user/name@v1", ModelError, "v2")


def test_a_path_is_not_the_name_of_a_repo_and_a_branch_has_gits_letters():
    for text in ("", "a b", "./here", "/abs", "~/x", "a/b/c", "a/", "@main", "../up", ".x/y", "-x"):
        assert not is_namespaced(text)
        with pytest.raises(ModelError, match="is neither a folder nor the name of a hub repo"):
            parse(text, ModelError)
    for revision in ("", "a b", "../../x", "a..b", "x\ny", '";rm', "-f", "^1"):
        with pytest.raises(ModelError, match="is not a revision, expected a branch, tag or commit"):
            parse(f"user/name@{revision}", ModelError)


# ---- files ----


def test_repo_ids_with_revisions_do_for_convert_and_generate(hub, work, online):
    hub.repos["user/base"].refs["v1"] = hub.repos["user/base"].refs["main"]
    hub.repos["user/base"].commit({"config.json": b"{}"})  # what came later is not a model
    result = run("convert", "user/ckpt@main", "adapter", "--model", "user/base@v1")
    assert (result.code, result.out) == (0, ""), result.err
    assert result.err.endswith("adapter: K = 4, D = 64, 50 tensors, 0.9 MB, base user/base@v1\n")
    # The recorded base, its revision included, is the default.
    result = run("generate", "--adapter-path", "adapter", "prompt.txt", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["text"] == "false"


def test_an_adapter_by_repo_id_gives_the_text_of_the_local_one(work, online, adapter_path):
    args = ("generate", "--model", "user/base", "prompt.txt", "--adapter-path")
    local, ours = (run(*args, path) for path in (adapter_path, "user/adapter@main"))
    assert (ours.code, ours.out) == (0, local.out)
    assert ours.out == "false\n"
    for name, kind in (("adapter", "adapter"), ("base", "base model"), ("ckpt", "checkpoint")):
        info = json.loads(run("info", f"user/{name}", "--json").out)
        assert (info["kind"], info["path"]) == (kind, f"user/{name}")


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
    with pytest.raises(AdapterError, match=r"user/one is not an adapter folder: merge_config\."):
        adapter_folder("user/one")


# ---- refusals ----

NO_REPO = "and the hub has no such repo, or a private one: check the name, or `hf auth login`"
FAULTS = {
    "missing": NO_REPO,
    "private": NO_REPO,
    "gated": "is gated: accept its terms on its hub",
    401: "another token (401): `hf auth login`, or",
    403: "the token may not read it (403): give one",
    429: "the hub cannot answer now, try again later: 429 Too Many Requests",
    500: "the hub cannot answer now, try again later: Server error '500",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_hub_is_one_line_and_a_second_try_works(hub, online, fault):
    repo, line = hub.repos["user/ckpt"], FAULTS[fault]
    if fault == "missing":
        del hub.repos["user/ckpt"]
    elif fault == "gated":
        hub.locked.add("user/ckpt")
    elif fault == "private":
        repo.private = True
    else:
        hub.refuse["info"] = fault
    text = refused()
    assert text.startswith("user/ckpt is ")
    assert line in text
    assert "\n" not in text
    for faults in (hub.locked, hub.refuse):
        faults.clear()
    repo.private = False
    hub.repos["user/ckpt"] = repo
    assert (fetch("user/ckpt", ["*"], KMergeError) / "encoder.pth").is_file()


@pytest.mark.slow
def test_a_connection_cut_in_mid_file_is_one_line_and_a_second_try_goes_on(hub, work, online):
    hub.cut.add("encoder.pth")
    line = f"{TAKEN}, and the connection to the hub broke: try again"
    assert_said(run("convert", "user/ckpt", "adapter"), line)
    assert not (work / "adapter").exists()
    hub.cut.clear()
    hub.requests.clear()
    assert run("convert", "user/ckpt", "adapter").code == 0
    asked = [r.rsplit("/", 1)[-1] for r in hub.requests if r.startswith("HEAD user/ckpt")]
    assert asked == ["encoder.pth"]  # what came whole is kept


def test_offline_the_cache_does_and_the_network_is_left_alone(hub, tmp_path):
    line = f"{TAKEN}, which is not in the cache, or not all of it, and "
    with using(hub, tmp_path / "home", HF_HUB_OFFLINE=True):
        assert refused() == line + "HF_HUB_OFFLINE is set, so the hub is not asked: unset it"
    with using(hub, tmp_path / "home"):
        folder = fetch("user/ckpt", ["*"], KMergeError)
    hub.requests.clear()
    with using(hub, tmp_path / "home", HF_HUB_OFFLINE=True):
        assert fetch("user/ckpt", ["*"], KMergeError) == folder
    assert hub.requests == []
    hub.url = "http://127.0.0.1:9"  # the port of a service that nobody runs
    with using(hub, tmp_path / "new home"):
        assert refused() == line + "the connection to the hub broke: try again"


@pytest.mark.slow
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
    said = f"{TAKEN}, and cannot write the hub's cache: File too large\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {said}")
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    with using(hub, tmp_path / "home"):
        assert run("convert", "user/ckpt", "adapter").code == 0
