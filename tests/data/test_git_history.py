"""A git history as rows: which commits count, what they hold, and what a stranger's cannot do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kmerge_mlx.data import git_history
from kmerge_mlx.data.git_history import CommitTask, log, repo_name
from kmerge_mlx.errors import DataError, SettingsError

FEW = {"test": 1, "valid": 1}


class Repo:
    """A git repository to commit into."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str, stdin: str = "") -> str:
        """Runs git in it."""
        who = ("-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgSign=false")
        how = {"input": stdin.encode(), "check": True, "capture_output": True}
        run = subprocess.run(["git", "-C", self.path, *who, *arguments], **how)
        return run.stdout.decode()

    def commit(self, message: str, **files: str | bytes | None) -> str:
        """Writes files (``a_py`` is a.py; None removes one), commits, and returns the id."""
        for name, content in files.items():
            path = self.path / name.replace("_", ".")
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-F", "-", stdin=message)
        return self.git("rev-parse", "HEAD").strip()


def history(path: Path, files: int = 6, edits: int = 4) -> Repo:
    """Python files, edited one at a time."""
    repo = Repo(path)
    names = [f"f{i}_py" for i in range(files)]
    repo.commit("all", **{name: f"{path.name} {name} = 0\n" for name in names})
    for name in names:
        for edit in range(1, edits + 1):
            repo.commit(f"{name} to {edit}", **{name: f"{path.name} {name} = {edit}\n"})
    return repo


def rows_of(folder: Path) -> dict[str, list[dict]]:
    return {p.stem: [json.loads(r) for r in p.open()] for p in sorted(folder.glob("*.jsonl"))}


def subjects(repo: Repo, **options: object) -> set[str]:
    rows = CommitTask(repo=(str(repo.path),), **options).rows(None, lambda done, total: None)
    return {item.row["subject"] for _, item in rows if item}


def test_a_row_is_what_git_shows_of_the_commit(tmp_path):
    repo = Repo(tmp_path / "owner" / "app")
    repo.commit("one", a_py="x = 1\n", ü_md="# é\n")
    repo.commit(": a subject\n\nand a\x1e body\nof lines", a_py="x = 2\r\n\tñ🙂")
    repo.commit("empty")
    repo.commit("title", ü_md="# è\n")
    task = CommitTask(repo=(str(repo.path),))
    items = [item for _, item in task.rows(None, lambda done, total: None)]
    assert [item.row["old_file"] for item in items] == ["ü.md", "a.py"]
    for item in items:
        commit, path = item.row["commit"], item.row["old_file"]
        shown = repo.git("show", "-s", "--format=%s%n%n%b", commit).strip()
        assert item.row == {
            "commit": commit,
            "old_file": path,
            "new_file": path,
            "old_contents": repo.git("show", f"{commit}~:{path}"),
            "new_contents": repo.git("show", f"{commit}:{path}"),
            "subject": shown.split("\n")[0],
            "message": repo.git("show", "-s", "--format=%B", commit).strip(),
            "lang": {"a.py": "python", "ü.md": "markdown"}[path],
            "repos": "owner/app",
        }


def test_only_edits_of_one_short_text_file_count(tmp_path):
    repo = Repo(tmp_path / "app")
    bare = {"a_py": "x = 1\n", "b_py": "y\n", "c_bin": "z", "d_py": b"\xff", "e_py": "a\0b"}
    repo.commit("new files", **bare, f_py="", g_py="long " * 9, h_py="é" * 30)
    repo.commit("edit", a_py="x = 2\n")
    repo.commit("two files", a_py="x = 3\n", b_py="y = 1\n")
    repo.commit("a suffix of no language", c_bin="zz")
    repo.commit("not UTF-8", d_py=b"\xfe")
    repo.commit("a zero byte", e_py="a\0c")
    repo.commit("was empty", f_py="x")
    repo.commit("is empty", f_py="")
    repo.commit("too long", g_py="longer " * 9)
    repo.commit("as long as may be", h_py="è" * 30)
    repo.commit("another file", i_py="x")
    repo.commit("one file less", i_py=None)
    repo.git("mv", "b.py", "renamed.py")
    repo.commit("renamed")
    (repo.path / "a.py").chmod(0o755)
    repo.commit("mode alone")
    (repo.path / "a.py").unlink()
    (repo.path / "a.py").symlink_to("d.py")
    repo.commit("a link")
    repo.git("checkout", "-q", "-b", "side", "HEAD~3")
    repo.commit("on a branch", h_py="ê" * 30)
    repo.git("checkout", "-q", "main")
    repo.git("merge", "-q", "--no-ff", "-m", "a merge", "side")
    assert subjects(repo, max_chars=30) == {"edit", "as long as may be", "on a branch"}
    assert "too long" in subjects(repo, max_chars=70)
    repo.commit("a note", j_md="x")
    repo.commit("edited note", j_md="y")
    assert subjects(repo, max_chars=30, language="markdown") == {"edited note"}


def test_no_file_is_in_two_splits_and_the_seed_decides(tmp_path):
    repos = [str(history(tmp_path / name).path) for name in ("one", "two")]
    sizes = {"test": 9, "valid": 4}
    first = CommitTask(repo=repos, sizes=sizes).write(tmp_path / "a")
    assert first["shared_files"] == 0
    assert first["splits"]["train"]["languages"] == {"python": 32}
    found = rows_of(tmp_path / "a")
    assert {split: len(rows) for split, rows in found.items()} == {
        "test": 9,
        "train": 32,
        "valid": 4,
    }
    files = [{(row["repos"], row["old_file"]) for row in rows} for rows in found.values()]
    assert sum(map(len, files)) == len(set().union(*files)) == 12
    CommitTask(repo=repos[::-1], sizes=sizes).write(tmp_path / "b")
    assert rows_of(tmp_path / "b") == found
    CommitTask(repo=repos, sizes=sizes, seed=1).write(tmp_path / "c")
    assert rows_of(tmp_path / "c") != found


def test_the_commits_of_a_fork_count_once(tmp_path):
    repo = history(tmp_path / "app")
    shutil.copytree(repo.path, tmp_path / "fork")
    both = (str(repo.path), str(tmp_path / "fork"))
    summary = CommitTask(repo=both).write(tmp_path / "both")
    assert (summary["rows_read"], summary["repeated_prompts"], summary["shared_files"]) == (
        48,
        24,
        0,
    )
    CommitTask(repo=both[:1]).write(tmp_path / "one")
    assert rows_of(tmp_path / "both") == rows_of(tmp_path / "one")


def test_a_repository_is_named_by_where_it_was_cloned_from_or_by_its_folder(tmp_path):
    repo = Repo(tmp_path / "me" / "app")
    (repo.path / "sub").mkdir()
    assert repo_name(str(repo.path / "sub")) == "me/app"
    for url in ("https://user:secret@host/owner/name.git", "git@host:owner/name", "/a/owner/name/"):
        repo.git("config", "remote.origin.url", url)
        assert repo_name(str(repo.path)) == "owner/name"


def test_what_cannot_be_read_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for folder, said in (
        (tmp_path / "none", "not a git repository"),
        (tmp_path / "gone", "cannot change to"),
        (Repo(tmp_path / "new").path, "does not have any commits"),
    ):
        with pytest.raises(DataError, match=f"cannot read the history of {folder}: .*{said}"):
            CommitTask(repo=(str(folder),)).examples()
    repo = history(tmp_path / "app", files=2, edits=1)
    with pytest.raises(DataError, match=r"too small: found 2 distinct files, expected more than"):
        CommitTask(repo=(str(repo.path),)).examples()
    (repo.path / "docs").mkdir()
    with pytest.raises(DataError, match=rf"docs is a folder of the repository .*{repo.path.name}"):
        CommitTask(repo=(str(repo.path / "docs"),)).examples()
    repo.git("clone", "-q", "--depth", "1", f"file://{repo.path}", str(tmp_path / "shallow"))
    with pytest.raises(DataError, match=r"shallow \(a shallow clone\) is too small: found 0"):
        CommitTask(repo=(str(tmp_path / "shallow"),)).examples()
    with pytest.raises(SettingsError, match="`language` is 'cobol', expected one of c, c#"):
        CommitTask(repo=("x",), language="cobol")
    with pytest.raises(SettingsError, match="commits needs a `repo`"):
        CommitTask()
    monkeypatch.setattr(git_history, "MAX_LINE_BYTES", 100)
    repo.commit("long " * 40_000)
    with pytest.raises(DataError, match="has a commit message over"):
        list(log(str(repo.path)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"cannot run git .*: install it"):
        list(log(str(repo.path)))


def test_a_damaged_object_is_one_error(tmp_path):
    repo = history(tmp_path / "app")
    blob = repo.git("rev-parse", "HEAD:f5.py").strip()
    path = repo.path / ".git" / "objects" / blob[:2] / blob[2:]
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-6:] = b"damage"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"cannot read object {blob}: the repository is damaged"):
        CommitTask(repo=(str(repo.path),)).examples()


def test_a_hook_reads_the_repository_that_is_named(tmp_path, monkeypatch):
    repo, other = history(tmp_path / "app"), history(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other.path / ".git"))
    items = CommitTask(repo=(str(repo.path),)).rows(None, lambda done, total: None)
    assert all("app f" in item.row["new_contents"] for _, item in items)


def test_a_strangers_repository_runs_nothing_and_fetches_nothing(tmp_path, monkeypatch):
    repo, marker = history(tmp_path / "app"), tmp_path / "ran"
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/sh\ntouch {marker}\n")
    script.chmod(0o755)
    for setting in (
        *("core.pager", "pager.log", "core.fsmonitor", "core.sshCommand", "core.editor"),
        *("gpg.program", "diff.external", "diff.x.textconv", "diff.x.command", "filter.x.smudge"),
        *("filter.x.clean", "filter.x.process", "credential.helper", "core.askPass", "alias.log"),
        *("core.alternateRefsCommand", "remote.origin.uploadpack", "core.gitProxy"),
    ):
        repo.git("config", setting, f"!{script}" if setting == "alias.log" else str(script))
    for setting, value in {
        "log.showSignature": "true",
        "diff.relative": "true",
        "diff.renames": "copies",
        "color.ui": "always",
        "core.quotePath": "true",
        "core.repositoryFormatVersion": "1",
        "extensions.partialClone": "origin",
        "remote.origin.promisor": "true",
        "remote.origin.url": f"ext::{script}",
        "protocol.ext.allow": "always",
        "protocol.allow": "always",
        "core.hooksPath": str(tmp_path),
    }.items():
        repo.git("config", setting, value)
    (repo.path / ".git" / "info" / "attributes").write_text("* diff=x filter=x\n")
    commit = repo.git("cat-file", "commit", "HEAD")
    signed = commit.replace("\n\n", "\ngpgsig -----BEGIN PGP SIGNATURE-----\n x\n\n", 1)
    made = repo.git("hash-object", "-t", "commit", "-w", "--stdin", stdin=signed)
    repo.git("update-ref", "refs/heads/main", made.strip())
    blob = repo.git("rev-parse", "HEAD~1:f0.py").strip()
    (repo.path / ".git" / "objects" / blob[:2] / blob[2:]).unlink()  # a promised one
    assert len(subjects(repo)) == 23
    assert not marker.exists()
    # The trap is armed: git without these precautions does run it.
    subprocess.run(
        ["git", "-C", repo.path, "cat-file", "-p", blob], capture_output=True, check=False
    )
    assert marker.exists()
    assert "GIT_ALLOW_PROTOCOL" not in os.environ
