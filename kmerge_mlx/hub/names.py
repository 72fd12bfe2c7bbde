"""The names of hub repos: ``user/name``, and ``user/name@revision``.

Owns their one parser. Does not ask the hub whether there is such a repo.

Source: huggingface_hub's ``validate_repo_id`` (no repo id holds an ``@``); git-check-ref-format (no
name of a branch or tag holds ``..`` or white space).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kmerge_mlx.errors import KMergeError, short

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./+#=,-]*")


@dataclass(frozen=True)
class RepoName:
    """A repo, and which of its versions.

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
    """Reads a repo's name as a user writes it; a folder of that name is the caller's to look for.

    Args:
        text: ``user/name`` or ``user/name@revision``.
        error: Kind of error to raise.
        revision: One that was given apart, or None.
        kind: What kind of repo is meant, for the error.

    Raises:
        KMergeError: It cannot be the name of a repo, or names two revisions.
    """
    repo, at, named = text.partition("@")
    if not _ID.fullmatch(repo):
        raise error(f"{text} is neither a folder nor the name of a hub {kind}")
    if at and revision not in (None, named):
        raise error(f"{text} names another revision than {short(revision)}: give one of them")
    wanted = named if at else revision
    if wanted is not None and not _REVISION.fullmatch(wanted):
        raise error(f"{text}: {short(wanted)} is no revision, expected a branch, tag or commit")
    return RepoName(repo, wanted)


def is_namespaced(text: str) -> bool:
    """Whether a text has the form ``user/name``, revision or not, as all but old base models do."""
    repo = text.partition("@")[0]
    return "/" in repo and _ID.fullmatch(repo) is not None
