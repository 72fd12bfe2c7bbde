"""Names of repos, the check of what a download left, and what is held back of the client's word."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import subprocess
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id

from kmerge_mlx.errors import ModelError
from kmerge_mlx.hub.checksums import checking
from kmerge_mlx.hub.names import RepoName, is_namespaced, parse
from kmerge_mlx.hub.quiet import quietly
from kmerge_mlx.hub.refusals import why

REPO = "models--user--name"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("user/name", RepoName("user/name")),
        ("gpt2", RepoName("gpt2")),
        ("user/name@v1.0", RepoName("user/name", "v1.0")),
        ("user/name@refs/pr/3", RepoName("user/name", "refs/pr/3")),
        ("user/na.me-2@" + "c" * 40, RepoName("user/na.me-2", "c" * 40)),
    ],
)
def test_a_name_holds_a_revision_after_its_at(text, found):
    assert parse(text, ModelError) == found
    assert str(found) == text
    validate_repo_id(found.id)  # the hub client's own rule


@pytest.mark.parametrize(
    "text",
    ["", "a b", "./here", "/abs", "~/x", "a/b/c", "a/", "@main", "../up", ".hidden/x", "-x/y"],
)
def test_a_path_is_no_name_of_a_repo(text):
    assert not is_namespaced(text)
    with pytest.raises(ModelError, match="is neither a folder nor the name of a hub repo"):
        parse(text, ModelError)


@pytest.mark.parametrize("revision", ["", "a b", "../../x", "a..b", "x\ny", '";rm', "-f", "^1"])
def test_what_git_allows_in_no_branch_is_no_revision(revision):
    with pytest.raises(ModelError, match="is no revision, expected a branch, tag or commit"):
        parse(f"user/name@{revision}", ModelError)


def test_a_revision_given_twice_must_be_the_same():
    assert parse("user/name", ModelError, "v1") == RepoName("user/name", "v1")
    assert parse("user/name@v1", ModelError, "v1") == RepoName("user/name", "v1")
    with pytest.raises(ModelError, match="names another revision than 'v2': give one of them"):
        parse("user/name@v1", ModelError, "v2")


def git_hash(path: Path) -> str:
    done = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Cache:
    """A repo in a hub cache, filled by hand."""

    def __init__(self, root: Path):
        self.root, self.folder = root, root / REPO
        self.snapshot = self.folder / "snapshots" / ("0" * 40)
        for path in (self.folder / "blobs", self.snapshot / "k4"):
            path.mkdir(parents=True)

    def add(self, name: str, blob: str, content: bytes) -> Path:
        (self.folder / "blobs" / blob).write_bytes(content)
        link = self.snapshot / name
        link.symlink_to(os.path.relpath(self.folder / "blobs" / blob, link.parent))
        return link

    def run(self, *files: tuple[str, str, bytes]) -> list[str]:
        """A download of these files; what came wrong."""
        with checking(self.root, REPO) as wrong:
            for file in files:
                self.add(*file)
        return wrong


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "hub")


def test_a_file_that_came_right_stays_by_each_of_the_hubs_hashes(cache, tmp_path):
    content = b"config" * 1000
    (tmp_path / "file").write_bytes(content)
    names = (
        git_hash(tmp_path / "file"),
        hashlib.sha256(content).hexdigest(),
        hashlib.sha1(content).hexdigest(),  # a mirror's
        "no-hash",
    )
    assert cache.run(*((f"f{i}", blob, content) for i, blob in enumerate(names))) == []
    assert {path.name for path in cache.snapshot.iterdir()} == {"k4", "f0", "f1", "f2", "f3"}
    assert not list(cache.root.rglob("kmerge*"))


@pytest.mark.parametrize("length", [40, 64])
def test_a_file_that_came_wrong_goes_with_its_links(cache, length):
    assert cache.run(("k4/x.json", "a" * length, b"other")) == ["k4/x.json"]
    assert list((cache.folder / "blobs").iterdir()) == []
    assert not (cache.snapshot / "k4" / "x.json").is_symlink()


def test_a_shared_file_that_came_wrong_goes_too(cache):
    shared = cache.root / "blobs" / "aa"
    shared.parent.mkdir()
    shared.write_bytes(b"other")
    with checking(cache.root, REPO) as wrong:
        link = cache.add("x", "a" * 64, b"")
        blob = cache.folder / "blobs" / ("a" * 64)
        blob.unlink()
        blob.symlink_to(shared)
    assert wrong == ["x"]
    assert not shared.exists()
    assert not link.is_symlink()


def test_files_of_earlier_downloads_are_believed(cache):
    cache.add("old", "a" * 64, b"of another tool, or of a checked download")
    assert cache.run(("new", "b" * 64, b"wrong")) == ["new"]
    assert (cache.snapshot / "old").exists()


def test_what_a_killed_download_left_is_checked_by_the_next_one(cache):
    cache.add("old", "a" * 64, b"believed")

    # A kill runs no cleaning: the note and an unchecked file stay.
    killed = checking(cache.root, REPO)
    killed.__enter__()
    cache.add("new", "b" * 64, b"wrong")
    assert cache.run() == ["new"]
    assert cache.run() == []
    assert (cache.snapshot / "old").exists()


def test_a_failed_download_throws_away_what_came_wrong(cache):
    with contextlib.suppress(OSError), checking(cache.root, REPO) as wrong:
        cache.add("new", "b" * 64, b"wrong")
        raise OSError("cut")
    assert wrong == ["new"]
    assert list((cache.folder / "blobs").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "hub").write_text("a file")
    with checking(tmp_path / "hub", REPO) as wrong:
        pass
    assert wrong == []


SAID = (
    "'[Errno 111] Connection refused' thrown while requesting HEAD http://hub/x",
    "Retrying in 1s [Retry 1/5].",
    "Error while downloading from http://hub/x: peer closed\nTrying to resume download...",
    "Rate limited. Waiting 61.0s before retry [Retry 1/5].",
    "A warning that the hub sends",
)


def heard(monkeypatch, verbosity: str) -> list[str]:
    """What comes out of the hub client's log."""
    monkeypatch.setenv("HF_HUB_VERBOSITY", verbosity)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("huggingface_hub")
    log.addHandler(handler)
    try:
        with quietly():
            for line in SAID:
                logging.getLogger("huggingface_hub.utils._http").warning(line)
    finally:
        log.removeHandler(handler)
    assert handler.filters == []
    return stream.getvalue().splitlines()


def test_only_the_clients_retries_are_held_back_and_its_own_setting_shows_them(monkeypatch):
    assert heard(monkeypatch, "") == [*SAID[3:]]
    assert heard(monkeypatch, "warning") == "\n".join(SAID).splitlines()


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OSError(28, "No space left on device"), "cannot write the hub's cache: No space left"),
        (OSError(13, "Permission denied", "/cache/x"), "cannot write /cache/x: Permission denied"),
        (ConnectionResetError(104, "reset"), "the connection to the hub broke: try again"),
        (OSError("Consistency check failed: file should be of size 3"), "the connection to the"),
        (ValueError("Bad\n- license"), "the hub's client says: Bad - license"),
    ],
)
def test_a_failure_of_this_machine_is_told_from_one_of_the_network(failure, said):
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = failure
    assert why(failure, "read").startswith(said)
    if not isinstance(failure, ValueError):
        assert why(wrapped, "read").startswith(said)
