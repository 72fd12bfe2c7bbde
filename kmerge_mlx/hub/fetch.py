"""Downloads files of hub repos, and says in one line why the hub did not give them.

``huggingface_hub`` does the work: its cache, its checks, ``HF_HUB_OFFLINE``, its progress bars.

Source: https://huggingface.co/docs/huggingface_hub (errors); huggingface_hub's ``validate_repo_id``
(a repo id does not hold ``@``); git-check-ref-format (a branch or tag does not hold ``..``).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge_mlx.errors import KMergeError, first_line, short

MODEL, DATASET = "model", "dataset"
KINDS = {MODEL: "repo", DATASET: "dataset"}

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./+#=,-]*")

_held: dict[tuple[str, RepoName], str] | None = None
"""The commit of each repo that this command has met; None outside of a command."""


@dataclass(frozen=True)
class RepoName:
    """A hub repo, and which of its versions.

    Args:
        id: ``user/name``, or ``name`` for the oldest repos of the hub.
        revision: Branch, tag or commit, or None: its default branch.
    """

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def parse(
    text: str, error: type[KMergeError], revision: str | None = None, kind: str = "repo"
) -> RepoName:
    """Reads a repo's name, ``user/name`` or ``user/name@revision``.

    Args:
        text: The name.
        error: Kind of error to raise.
        revision: A revision that was given apart, or None.
        kind: The kind of repo, for the error.

    Raises:
        KMergeError: Not the name of a repo, or two different revisions.
    """
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
    """Makes a repo's name mean one commit for the whole of a command.

    A command asks for the same repo several times. A push in between must not give it the halves
    of two versions, and the hub is asked only once.
    """
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
    """Downloads those files of a repo that match, unless the hub's cache has them.

    Args:
        name: ``user/name`` or ``user/name@revision``.
        patterns: Names of files, or shell patterns of names.
        error: Kind of error to raise.
        revision: A revision that was given apart, or None.
        repo_type: ``model`` or ``dataset``.

    Returns:
        The folder in the cache, whose name is the commit.

    Raises:
        KMergeError: One line with what the hub answered.
    """
    from huggingface_hub import snapshot_download

    repo = parse(name, error, revision, KINDS[repo_type])
    commit = None if _held is None else _held.get((repo_type, repo))

    def download() -> str:
        return snapshot_download(
            repo.id,
            repo_type=repo_type,
            revision=commit or repo.revision,
            allow_patterns=list(patterns),
        )

    folder = _download(repo, repo_type, error, None, download)
    if _held is not None:
        _held[repo_type, repo] = folder.name
    return folder


def fetch_file(
    name: str, filename: str, error: type[KMergeError], *, repo_type: str = MODEL
) -> Path:
    """Downloads one file of a repo, ``filename`` inside it; otherwise as :func:`fetch`."""
    from huggingface_hub import hf_hub_download

    repo = parse(name, error, kind=KINDS[repo_type])

    def download() -> str:
        return hf_hub_download(repo.id, filename, repo_type=repo_type, revision=repo.revision)

    return _download(repo, repo_type, error, filename, download)


def quiet() -> None:
    """Keeps the hub client's retries, and its bars without a terminal, out of a command's output.

    Its own ``HF_HUB_VERBOSITY`` and ``HF_HUB_DISABLE_PROGRESS_BARS`` have the last word.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    watched = sys.stderr is not None and sys.stderr.isatty()
    if _held is not None and "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    if _held is not None and not watched and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()


def _download(
    repo: RepoName,
    repo_type: str,
    error: type[KMergeError],
    filename: str | None,
    download: Callable[[], str],
) -> Path:
    quiet()
    try:
        return Path(download())
    except Exception as failure:  # the hub client's errors share no base with the network's
        raise error(_refusal(repo, KINDS[repo_type], filename, failure)) from failure


def _refusal(repo: RepoName, kind: str, filename: str | None, failure: BaseException) -> str:
    """One line for a download of a repo, or of one file of it, that failed."""
    from huggingface_hub import errors

    cause = failure.__cause__
    if isinstance(failure, errors.LocalEntryNotFoundError) and isinstance(
        cause, errors.HfHubHTTPError | errors.FileMetadataError
    ):
        failure = cause  # why the hub did not give what is not in the cache
    what = f"{repo} is not a folder here" if filename is None else f"{repo}/{filename}:"
    joined = f"{what}, and" if filename is None else what
    if isinstance(failure, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms on its hub page, then `hf auth login`"
    if isinstance(failure, errors.RepositoryNotFoundError):
        login = "check the name, or `hf auth login`"
        return f"{joined} the hub does not have such a {kind}, or it is private: {login}"
    if isinstance(failure, errors.RevisionNotFoundError):
        return f"{repo.id} does not have the revision {repo.revision}: give a branch, tag or commit"
    if isinstance(failure, errors.LocalEntryNotFoundError):
        reason = _offline(failure) or "the hub cannot be reached: check the connection"
        missing = "and not in the cache, or not all of it" if filename is None else "not cached"
        return f"{what} {missing}, and {reason}"
    if isinstance(failure, errors.EntryNotFoundError):
        return f"{repo} does not have the file {filename}: check the name on its hub page"
    return f"{joined} {why(failure, 'read')}"


def why(failure: BaseException, do: str) -> str:
    """Why a download or an upload failed and what to do, without the repo's name.

    Args:
        failure: What the hub client raised.
        do: ``read`` or ``write``: what a token must allow.
    """
    from huggingface_hub import errors

    if offline := _offline(failure):
        return offline
    for cause in _causes(failure):
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
    return f"the hub's client says: {_one_line(str(failure)) or first_line(failure)}"


def _status(failure: Any, do: str) -> str:
    """What an HTTP status of the hub means (``failure`` is an ``HfHubHTTPError``)."""
    status, headers = failure.response.status_code, failure.response.headers
    limit = re.search(r";\s*t=(\d+)", headers.get("ratelimit", ""))
    seconds = limit[1] if limit else headers.get("retry-after", "")
    wait = f"{seconds} seconds" if seconds.isdecimal() else "a few minutes"
    known = {
        401: "the hub asks for another token (401): `hf auth login`, or set HF_TOKEN",
        403: f"the token may not {do} it (403): give one that may with `hf auth login`",
        429: f"the hub has too many requests (429): try again in {wait}",
    }
    if status >= 500:
        return f"the hub cannot answer now ({status}): try again in a while"
    refused = _one_line(failure.server_message or first_line(failure))
    return known.get(status, f"the hub refused it: {refused}")


def _one_line(text: str) -> str:
    """What a server wrote, as it may stand in an error: printable, in one line, not too long."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]


def _offline(failure: BaseException) -> str | None:
    from huggingface_hub import errors

    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in _causes(failure)):
        return "HF_HUB_OFFLINE is set, so the hub is not asked: unset it"
    return None


def _causes(failure: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = failure
    while cause is not None:
        yield cause
        cause = cause.__cause__
