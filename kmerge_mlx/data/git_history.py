"""Reads the history of git repositories as rows of CommitPackFT: a file before and after a commit.

Source: the schema of the hub dataset bigcode/commitpackft; git-log(1), git-cat-file(1).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

from kmerge_mlx.data.jsonl import MAX_LINE_BYTES, BadLines
from kmerge_mlx.data.tasks import DrawnTask, Item, Progress
from kmerge_mlx.errors import DataError, SettingsError, short

LANGUAGES = {
    "c": "c h",
    "c#": "cs",
    "c++": "cc cpp cxx hh hpp hxx",
    "css": "css",
    "dart": "dart",
    "go": "go",
    "haskell": "hs",
    "html": "htm html",
    "java": "java",
    "javascript": "cjs js jsx mjs",
    "json": "json",
    "julia": "jl",
    "kotlin": "kt kts",
    "lua": "lua",
    "markdown": "markdown md",
    "metal": "metal",
    "objective-c": "m",
    "perl": "pl pm",
    "php": "php",
    "python": "py pyi",
    "r": "r",
    "restructuredtext": "rst",
    "ruby": "rb",
    "rust": "rs",
    "scala": "scala",
    "shell": "bash sh zsh",
    "sql": "sql",
    "swift": "swift",
    "text": "txt",
    "toml": "toml",
    "typescript": "ts tsx",
    "xml": "xml",
    "yaml": "yaml yml",
}
"""CommitPackFT's names of languages, and the suffixes of their files."""
BY_SUFFIX = {f".{suffix}": name for name, ends in LANGUAGES.items() for suffix in ends.split()}
_FILES = {"100644", "100755"}
"""Git's modes of regular files: not links, not submodules."""
_SAFE = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}
"""A stranger's repository may not make git fetch, which can run programs; errors in English."""
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_OBJECT_DIRECTORY")
"""What git sets for its hooks would lead it to another repository."""
_LOG = (
    *("log", "-z", "--raw", "--no-abbrev", "--no-renames", "--no-relative", "--no-merges"),
    *("--no-show-signature", "--no-ext-diff", "--no-textconv", "--no-color", "--encoding=UTF-8"),
    "--format=%H%x00%s%x00%B",
)
_CHUNK = 1 << 16
_REPORT_EVERY = 100


class Edit(NamedTuple):
    """A commit that changes one file, with the ids of its contents before and after."""

    commit: str
    subject: str
    message: str
    path: str
    old: str
    new: str

    @property
    def language(self) -> str | None:
        """By the file's suffix; None for one that is not in ``LANGUAGES``."""
        return BY_SUFFIX.get(Path(self.path).suffix.lower())

    @property
    def number(self) -> int:
        """The commit's id, cut to 64 bits."""
        return int(self.commit[:16], 16)


@dataclass(frozen=True)
class CommitTask(DrawnTask):
    """The commits of repositories that change one text file, no file of which is in two splits.

    Merges are left out, and so are files that are new, empty, renamed or not UTF-8. Of a history,
    what HEAD is made of counts.
    """

    repo: Sequence[str] = ()  # folders
    language: str | None = None  # one of LANGUAGES; None is all of them
    max_chars: int = 4_000  # longest file, before and after

    name = "commits"
    unit = "files"
    left_out = "too long or not text"

    def __post_init__(self) -> None:
        if not self.repo:
            raise SettingsError("commits needs a `repo` to read the history of")
        if self.language not in (None, *LANGUAGES):
            raise SettingsError(
                f"`language` is {short(self.language)}, expected one of {', '.join(LANGUAGES)}"
            )

    @property
    def source(self) -> str:
        """The repositories."""
        shallow = ("rev-parse", "--is-shallow-repository")
        return ", ".join(
            f"{repo} (a shallow clone)" if _ask(repo, *shallow) == "true" else repo
            for repo in self.repo
        )

    def rows(
        self, bad: BadLines, progress: Progress, wanted: Container[int] | None = None
    ) -> Iterator[tuple[int, Item | None]]:
        """Reads the edits, or those of the ``wanted`` commits; None for one that is left out."""
        languages = LANGUAGES if self.language is None else (self.language,)
        edits = {
            repo: [
                edit
                for edit in log(repo)
                if edit.language in languages and (wanted is None or edit.number in wanted)
            ]
            for repo in self.repo
        }
        done, total = 0, sum(map(len, edits.values()))
        for repo, mine in edits.items():
            name = repo_name(repo)
            for edit, texts in zip(mine, contents(repo, mine, self.max_chars), strict=True):
                yield edit.number, None if texts is None else _item(name, edit, *texts)
                done += 1
                if done % _REPORT_EVERY == 0:
                    progress(done, total)
        progress(total, total)


def _item(repo: str, edit: Edit, old: str, new: str) -> Item:
    row = {
        "commit": edit.commit,
        "old_file": edit.path,
        "new_file": edit.path,
        "old_contents": old,
        "new_contents": new,
        "subject": edit.subject,
        "message": edit.message,
        "lang": edit.language,
        "repos": repo,
    }
    counted = {"languages": edit.language}
    return Item(row, f"{repo}/{edit.path}", counted, f"{old}\0{edit.subject}")


def repo_name(repo: str) -> str:
    """A repository's owner and name by the address it was cloned from, else its folder's."""
    place = _ask(repo, "config", "--get", "remote.origin.url")
    place = place or _ask(repo, "rev-parse", "--path-format=absolute", "--git-common-dir")
    place = place.rstrip("/").removesuffix(".git").rstrip("/")
    return "/".join(part for part in re.split("[/:]", place)[-2:] if part)


def log(repo: str) -> Iterator[Edit]:
    """Yields the commits that edit one file of a repository, newest first.

    Raises DataError where there is no history, or no git, or in a folder inside of a repository.
    """
    if _ask(repo, "rev-parse", "--show-prefix"):
        whole = _ask(repo, "rev-parse", "--show-toplevel")
        raise DataError(f"{repo} is a folder of the repository {whole}: give that, all is read")
    fields = _fields(repo)
    pending = next(fields, None)
    while pending is not None:
        commit, subject, message = pending, next(fields), next(fields)
        changes: list[tuple[list[str], str]] = []
        while (pending := next(fields, None)) and pending.lstrip("\n").startswith(":"):
            changes.append((pending.lstrip("\n")[1:].split(" "), next(fields)))
        if len(changes) == 1 and subject.strip():
            (old_mode, new_mode, old, new, status), path = changes[0]
            if status == "M" and {old_mode, new_mode} <= _FILES and old != new:
                yield Edit(commit, subject.strip(), message.strip(), path, old, new)


def _fields(repo: str) -> Iterator[str]:
    """What git's log prints, cut at the zero bytes, which no message and no path can hold."""
    # A file, because nobody reads a pipe meanwhile, and git would wait when it is full.
    with TemporaryFile() as said, _git(repo, *_LOG, stderr=said) as process:
        rest = b""
        while chunk := process.stdout.read(_CHUNK):
            *whole, rest = (rest + chunk).split(b"\0")
            yield from (field.decode(errors="replace") for field in whole)
            if len(rest) > MAX_LINE_BYTES:
                raise DataError(f"{repo} has a commit message over {MAX_LINE_BYTES >> 20} MiB")
        if process.wait():
            said.seek(0)
            lines = said.read(_CHUNK).decode(errors="replace").splitlines()
            reason = next((line for line in lines if line.startswith("fatal: ")), "git failed")
            raise DataError(f"cannot read the history of {repo}: {reason.removeprefix('fatal: ')}")


def contents(repo: str, edits: Sequence[Edit], max_chars: int) -> Iterator[tuple[str, str] | None]:
    """Yields the texts before and after each edit; None where one is not a short text."""
    asked = "".join(f"{edit.old}\n{edit.new}\n" for edit in edits).encode()
    with _git(repo, "cat-file", "--batch-check") as process:
        output, _ = process.communicate(asked)
    # A character of UTF-8 has at most 4 bytes, so larger files are not read at all.
    small = [
        len(found) == 3 and found[1] == b"blob" and 0 < int(found[2]) <= 4 * max_chars
        for found in map(bytes.split, output.splitlines())
    ]
    with _git(repo, "cat-file", "--batch", stderr=subprocess.DEVNULL) as process:
        for edit, *both in zip(edits, small[::2], small[1::2], strict=True):
            texts = [_read(process, name) for name in (edit.old, edit.new) if all(both)]
            known = [text for text in texts if text is not None and len(text) <= max_chars]
            yield tuple(known) if len(known) == 2 else None


def _read(process: subprocess.Popen[bytes], name: str) -> str | None:
    """Reads an object as text; None if it is not text."""
    process.stdin.write(f"{name}\n".encode())
    process.stdin.flush()
    head = process.stdout.readline().split()
    size = int(head[2]) if len(head) == 3 else 0
    data = process.stdout.read(size + 1)
    if len(data) <= size:
        raise DataError(f"git cannot read object {name}: the repository is damaged")
    try:
        text = data[:-1].decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _ask(repo: str, *arguments: str) -> str:
    with _git(repo, *arguments) as process:
        return process.communicate()[0].decode(errors="replace").strip()


def _git(repo: str, *arguments: str, **pipes: int | IO[bytes]) -> subprocess.Popen[bytes]:
    own = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    all_pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | pipes
    try:
        return subprocess.Popen(["git", "-C", repo, *arguments], env=own | _SAFE, **all_pipes)
    except OSError as error:
        raise DataError(f"cannot run git ({error.strerror}): install it") from None
