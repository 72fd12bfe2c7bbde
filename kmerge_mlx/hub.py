"""Downloads files of hub repos, and says in one line why the hub did not give them.

``huggingface_hub`` does the work: its cache, its checks, ``HF_HUB_OFFLINE``, its progress bars.

Source: https://huggingface.co/docs/huggingface_hub (errors); huggingface_hub's ``validate_repo_id``
(a repo id does not hold ``@``); git-check-ref-format (a branch or tag does not hold ``..``).
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kmerge_mlx.errors import KMergeError, short

MODEL, DATASET = "model", "dataset"

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./+#=,-]*")

_held: dict[tuple[str, RepoName], str] | None = None
"""The commit of each repo that this command has met; None outside of a command."""


@dataclass(frozen=True)
class RepoName:
    """A hub repo, and its branch, tag or commit; None is the default branch."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def parse(
    text: str, error: type[KMergeError], revision: str | None = None, kind: str = "repo"
) -> RepoName:
    """Reads a repo's name, ``user/name@revision``; ``revision`` is one that was given apart."""
    repo, at, named = text.partition("@")
    if not _ID.fullmatch(repo):
        raise error(f"{text} is neither a folder nor the name of a hub {kind}")
    if at and revision not in (None, named):
        raise error(f"{text} names another revision than {short(revision)}: give one of them")
    wanted = named if at else revision
    if wanted is not None and not _REVISION.fullmatch(wanted):
        raise error(f"{text}: {short(wanted)} is not a revision, expected a branch, tag or commit")
    return RepoName(repo, wanted)


def is_namespaced(text: str) -> bool:
    """Whether a text has the form ``user/name``, as the names of all but the oldest repos have."""
    repo = text.partition("@")[0]
    return "/" in repo and _ID.fullmatch(repo) is not None


@contextmanager
def one_version() -> Iterator[None]:
    """Makes a repo's name mean one commit for the whole of a command, whatever is pushed to it."""
    global _held
    before, _held = _held, {}
    try:
        yield
    finally:
        _held = before


def fetch(
    name: str,
    patterns: Sequence[str],
    error: type[KMergeError],
    *,
    revision: str | None = None,
    repo_type: str = MODEL,
) -> Path:
    """Downloads those files of a repo that match shell patterns, unless the hub's cache has them.

    Gives the folder in the cache, whose name is the commit. An ``error`` is one line with what the
    hub answered.
    """
    from huggingface_hub import snapshot_download

    kind = "repo" if repo_type == MODEL else repo_type
    repo = parse(name, error, revision, kind)
    _refuse_missing(name, error)
    held = {} if _held is None else _held
    wanted = held.get((repo_type, repo)) or repo.revision
    quiet()
    try:
        folder = snapshot_download(
            repo.id, repo_type=repo_type, revision=wanted, allow_patterns=list(patterns)
        )
    except Exception as failure:  # the hub client's errors share no base with the network's
        raise error(_refusal(repo, kind, failure)) from failure
    held[repo_type, repo] = Path(folder).name
    return Path(folder)


def fetch_file(
    name: str, filename: str, error: type[KMergeError], *, repo_type: str = MODEL
) -> Path:
    """Downloads one file of a repo, ``filename`` inside it; otherwise as :func:`fetch`."""
    path = fetch(name, [glob.escape(filename)], error, repo_type=repo_type) / filename
    if not path.is_file():
        raise error(
            f"{name} has no file {filename}, or it is not in the cache: check the name on its hub "
            "page"
        )
    return path


def quiet() -> None:
    """Keeps the hub client's retries, and its bars without a terminal, out of a command's output.

    Its own ``HF_HUB_VERBOSITY`` and ``HF_HUB_DISABLE_PROGRESS_BARS`` have the last word.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    if _held is None:
        return
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    watched = sys.stderr is not None and sys.stderr.isatty()
    if not watched and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()


def _refuse_missing(name: str, error: type[KMergeError]) -> None:
    """Refuses a path in a folder that is here: nobody means the hub by it."""
    path = Path(name)
    if "@" in name or path.parent == Path() or not path.parent.is_dir():
        return
    near = get_close_matches(path.name, [file.name for file in path.parent.iterdir()], 1)
    meant = f", did you mean {path.parent / near[0]}?" if near else f": look into {path.parent}"
    raise error(f"there is no {name} here{meant} (a hub repo of that name is {name}@main)")


def _refusal(repo: RepoName, kind: str, failure: BaseException) -> str:
    from huggingface_hub import errors

    cause = failure.__cause__
    absent = isinstance(failure, errors.LocalEntryNotFoundError)
    if absent and isinstance(cause, errors.HfHubHTTPError | errors.FileMetadataError):
        failure, absent = cause, False  # why the hub did not give what is not in the cache
    if isinstance(failure, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms on its hub page, then `hf auth login`"
    if isinstance(failure, errors.RevisionNotFoundError):
        return f"{repo.id} has no revision {repo.revision}: give a branch, tag or commit"
    reason = why(failure, "read")
    if isinstance(failure, errors.RepositoryNotFoundError):
        reason = f"the hub has no such {kind}, or a private one: check the name, or `hf auth login`"
    cached = ", which is not in the cache, or not all of it" if absent else ""
    return f"{repo} is not a folder here, so it was taken for a hub {kind}{cached}, and {reason}"


def why(failure: BaseException, do: str) -> str:
    """Why a download (``do`` is ``read``) or an upload (``write``) failed, and what to do."""
    from huggingface_hub import errors

    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so the hub is not asked: unset it"
        if isinstance(cause, errors.HfHubHTTPError):
            return _status(cause, do)
        # httpx, or httpx2: the client's releases differ. A short file is an OSError of its own.
        if (
            type(cause).__module__.startswith("httpx")
            or isinstance(cause, ConnectionError | TimeoutError)
            or str(cause).startswith("Consistency check failed")
        ):
            return "the connection to the hub broke: try again"
        # The client's errors are OSErrors too: only the system's have a number.
        if isinstance(cause, OSError) and cause.errno is not None:
            where = cause.filename or "the hub's cache"
            return f"cannot {'write' if do == 'read' else 'read'} {where}: {cause.strerror}"
        cause = cause.__cause__
    return f"the hub's client says: {_one_line(str(failure)) or type(failure).__name__}"


def _status(failure: Any, do: str) -> str:
    """What an HTTP status of the hub means (``failure`` is an ``HfHubHTTPError``)."""
    status = failure.response.status_code
    if status == 401:
        return "the hub asks for another token (401): `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not {do} it (403): give one that may with `hf auth login`"
    if status == 429 or status >= 500:  # with the seconds to wait, where the hub says them
        return f"the hub cannot answer now, try again later: {_one_line(str(failure))}"
    return f"the hub refused it: {_one_line(failure.server_message or str(failure))}"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]
