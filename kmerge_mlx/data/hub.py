"""Files of Hugging Face datasets, as they lie in their repos.

Owns: fetching by ``huggingface_hub`` (cached, resumed after a broken connection) and one line for
every way in which that fails. The ``datasets`` library is not used: it no longer runs the loading
scripts of the paper's two, and their raw files are JSONL. Does not know what the files mean.
"""

from __future__ import annotations

from pathlib import Path

from kmerge_mlx.errors import DataError, first_line


def fetch_file(repo_id: str, filename: str) -> Path:
    """One file of a dataset, from the cache if it is there.

    Args:
        repo_id: ``user/name``.
        filename: Path inside the repo.

    Raises:
        DataError: With one line, whatever the hub said.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, filename, repo_type="dataset"))
    except Exception as error:  # the hub client's errors share no base with the network's
        raise _refusal(repo_id, filename, error) from error


def fetch_matching(repo_id: str, patterns: list[str]) -> Path:
    """A local folder with those files of a dataset that match.

    Args:
        repo_id: ``user/name``.
        patterns: Names, or shell patterns of names.

    Raises:
        DataError: With one line, whatever the hub said.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # as above
        raise _refusal(repo_id, None, error) from error


def _refusal(repo_id: str, filename: str | None, error: Exception) -> DataError:
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return DataError(f"{repo_id} is neither a folder nor the name of a hub dataset")
    if isinstance(error, errors.GatedRepoError):
        return DataError(
            f"{repo_id} is gated: accept its terms on its hub page, then `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return DataError(
            f"{repo_id} is no folder here, and the hub has no such dataset, or a private one: "
            "check the name, or `hf auth login`"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        what = f"{repo_id}/{filename} is" if filename else f"{repo_id} is no folder here and"
        return DataError(f"{what} not in the cache, and the hub cannot be reached")
    if isinstance(error, errors.EntryNotFoundError):
        return DataError(f"{repo_id} has no file {filename}: check the name on its hub page")
    return DataError(f"the hub did not give {repo_id}: {first_line(error)}")
