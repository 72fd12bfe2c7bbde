"""What the hub, the network or the disk refused, each in one line that says what to do.

Owns these lines, for downloads and uploads. Does not know what was asked for beyond its name.

Source: https://huggingface.co/docs/huggingface_hub (errors), and
https://huggingface.co/docs/hub/rate-limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from kmerge_mlx.errors import KMergeError, first_line
from kmerge_mlx.hub.names import RepoName

_RESET = re.compile(r";\s*t=(\d+)")
_LONGEST = 300  # characters of what a server wrote


def came_wrong(repo: RepoName, files: Sequence[str], error: type[KMergeError]) -> KMergeError:
    """The refusal of files whose content is not what the hub announced."""
    named = _one_line(", ".join(sorted(files)))
    return error(
        f"{repo}: {named} did not come as the hub has it (its checksum differs) and was thrown "
        "away: try again"
    )


def refusal(
    repo: RepoName,
    kind: str,
    filename: str | None,
    failure: BaseException,
    error: type[KMergeError],
) -> KMergeError:
    """One line for a download that failed.

    Args:
        repo: What was wanted.
        kind: What kind of repo it is: ``repo`` or ``dataset``.
        filename: The one file of it that was wanted, or None.
        failure: What the hub client raised.
        error: Kind of error to make.
    """
    from huggingface_hub import errors

    what = f"{repo} is no folder here, and" if filename is None else f"{repo}/{filename}:"
    if isinstance(failure, errors.HFValidationError):
        return error(f"{repo} is neither a folder nor the name of a hub {kind}")
    if isinstance(failure, errors.GatedRepoError):
        return error(f"{repo} is gated: accept its terms on its hub page, then `hf auth login`")
    if isinstance(failure, errors.RepositoryNotFoundError):
        return error(
            f"{what} the hub has no such {kind}, or a private one: "
            "check the name, or `hf auth login`"
        )
    if isinstance(failure, errors.RevisionNotFoundError):
        return error(f"{repo.id} has no revision {repo.revision}: give a branch, tag or commit")
    if isinstance(failure, errors.LocalEntryNotFoundError):
        if isinstance(failure.__cause__, errors.HfHubHTTPError | errors.FileMetadataError):
            return refusal(repo, kind, filename, failure.__cause__, error)
        missing = f"{repo}/{filename} is not in the cache"
        if filename is None:
            missing = f"{repo} is no folder here and not in the cache, or not all of it"
        reason = _unreachable(failure) or "the hub cannot be reached: check the connection"
        return error(f"{missing}, and {reason}")
    if isinstance(failure, errors.EntryNotFoundError):
        return error(f"{repo} has no file {filename}: check the name on its hub page")
    return error(f"{what} {why(failure, 'read')}")


def why(failure: BaseException, do: str) -> str:
    """What stands in the way of a download or an upload, and what to do; no repo is named.

    Args:
        failure: What the hub client raised.
        do: ``read`` or ``write``: what a token must allow.
    """
    from huggingface_hub import errors

    if offline := _unreachable(failure):
        return offline
    for cause in _causes(failure):
        if isinstance(cause, errors.HfHubHTTPError):
            return _status(cause, do)
        if _is_of_the_network(cause):
            return "the connection to the hub broke: try again"
        # The client's errors are OSErrors too: only the system's have a number.
        if isinstance(cause, OSError) and cause.errno is not None:
            where = f" {cause.filename}" if cause.filename else " the hub's cache"
            return f"{'cannot write' if do == 'read' else 'cannot read'}{where}: {cause.strerror}"
    return f"the hub's client says: {_one_line(str(failure)) or first_line(failure)}"


def _status(failure: Any, do: str) -> str:
    """What an answer of the hub that is no success means.

    Args:
        failure: An ``HfHubHTTPError``.
        do: As for :func:`why`.
    """
    status, headers = failure.response.status_code, failure.response.headers
    if status == 401:
        return "the hub asks for another token (401): `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not {do} it (403): give one that may with `hf auth login`"
    if status == 429:
        limit = _RESET.search(headers.get("ratelimit", ""))
        wait = limit[1] if limit else headers.get("retry-after", "")
        return f"the hub has too many requests (429): try again in {_waiting(wait)}"
    if status >= 500:
        return f"the hub cannot answer now ({status}): try again in a while"
    return f"the hub refused it: {_one_line(failure.server_message or first_line(failure))}"


def _one_line(text: str) -> str:
    """What a server wrote, as it may stand in an error: a name, or a list over several lines."""
    printable = (c if c.isprintable() else "?" for c in " ".join(text.split()))
    return "".join(printable)[:_LONGEST]


def _waiting(seconds: str) -> str:
    if not seconds.isdecimal():
        return "a few minutes"
    return "a second" if int(seconds) < 2 else f"{seconds} seconds"


def _unreachable(failure: BaseException) -> str | None:
    """What to say where the client was told not to use the network."""
    from huggingface_hub import errors

    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in _causes(failure)):
        return "HF_HUB_OFFLINE is set, so the hub is not asked: unset it"
    return None


def _is_of_the_network(cause: BaseException) -> bool:
    # httpx, or httpx2: the client's releases differ. Its own word for a short file is an OSError.
    return (
        type(cause).__module__.startswith("httpx")
        or isinstance(cause, ConnectionError | TimeoutError)
        or str(cause).startswith("Consistency check failed")
    )


def _causes(failure: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = failure
    while cause is not None:
        yield cause
        cause = cause.__cause__
