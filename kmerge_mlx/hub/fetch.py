"""Files of hub repos, as they lie in its cache: fetched if they are not there, and checked.

Owns: the calls of ``huggingface_hub`` that download (cached, gone on with after a broken
connection, offline as ``HF_HUB_OFFLINE`` says) and the hold on the version that a command met
first. Does not know what the files mean, or how a failure is worded (``hub/refusals.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kmerge_mlx.errors import KMergeError
from kmerge_mlx.hub import names
from kmerge_mlx.hub.checksums import checking
from kmerge_mlx.hub.names import RepoName
from kmerge_mlx.hub.quiet import late_bar, quietly
from kmerge_mlx.hub.refusals import came_wrong, refusal

MODEL, DATASET = "model", "dataset"
KINDS = {MODEL: "repo", DATASET: "dataset"}

_held: dict[tuple[str, RepoName], str] | None = None


@contextmanager
def one_version() -> Iterator[None]:
    """Inside the block a name stands for the commit that it stood for at first.

    A command asks for the same repo several times; a push in between must not give it the halves
    of two versions, and the hub is asked once.
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
    """A local folder with those files of a repo that match, from the cache if they are there.

    Args:
        name: ``user/name`` or ``user/name@revision``.
        patterns: Names of files, or shell patterns of names.
        error: Kind of error to raise.
        revision: A revision that was given apart, or None.
        repo_type: ``model`` or ``dataset``.

    Raises:
        KMergeError: With one line, whatever the hub said.
    """
    from huggingface_hub import snapshot_download

    repo = names.parse(name, error, revision, KINDS[repo_type])
    commit = None if _held is None else _held.get((repo_type, repo))

    def download() -> str:
        return snapshot_download(
            repo.id,
            repo_type=repo_type,
            revision=commit or repo.revision,
            allow_patterns=list(patterns),
            tqdm_class=late_bar(),
        )

    folder = _download(repo, repo_type, error, None, download)
    if _held is not None:
        _held[repo_type, repo] = folder.name
    return folder


def fetch_file(
    name: str, filename: str, error: type[KMergeError], *, repo_type: str = MODEL
) -> Path:
    """One file of a repo, from the cache if it is there.

    Args:
        name: ``user/name`` or ``user/name@revision``.
        filename: Path inside the repo.
        error: Kind of error to raise.
        repo_type: ``model`` or ``dataset``.

    Raises:
        KMergeError: With one line, whatever the hub said.
    """
    from huggingface_hub import hf_hub_download

    repo = names.parse(name, error, kind=KINDS[repo_type])

    def download() -> str:
        return hf_hub_download(repo.id, filename, repo_type=repo_type, revision=repo.revision)

    return _download(repo, repo_type, error, filename, download)


def _download(
    repo: RepoName,
    repo_type: str,
    error: type[KMergeError],
    filename: str | None,
    download: Callable[[], str],
) -> Path:
    """Runs a download; what came wrong is removed, and what went wrong is one line."""
    from huggingface_hub import constants

    folder = f"{repo_type}s--{repo.id.replace('/', '--')}"
    try:
        with (
            checking(Path(constants.HF_HUB_CACHE), folder) as wrong,
            quietly(),
        ):
            path = Path(download())
    except Exception as e:  # the hub client's errors share no base with the network's
        raise refusal(repo, KINDS[repo_type], filename, e, error) from e
    if wrong:
        raise came_wrong(repo, wrong, error)
    return path
