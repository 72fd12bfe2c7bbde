"""Uploads adapters to a hub repo in one commit, without the paths of this machine.

An adapter's four files lie at the root of the repo, those of a folder of several under ``k{K}/``.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters.folder import (
    FILES,
    MERGE_CONFIG,
    TUNING_CONFIG,
    is_carried,
    look_up,
    read_adapter,
)
from kmerge_mlx.adapters.schema import BaseModelConfig, MergeConfig
from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.errors import KMergeError, UploadError, findings
from kmerge_mlx.files import read_json
from kmerge_mlx.hub import RepoName, fetch, is_namespaced, parse, quiet, why
from kmerge_mlx.tools.describe import describe_adapter

CARD = "README.md"

# A path from the root or the home folder, whole or in the middle of a text.
_PATH = re.compile(r"(?<![\w:/.~])~?/[^\s'\",;:()\[\]{}<>|`]+")


@dataclass(frozen=True)
class Upload:
    """What is to go up."""

    repo: RepoName  # its revision is the branch, None the default one
    base: BaseModelConfig  # a hub repo, or ``bundled``
    files: Mapping[str, bytes | Path]  # by their names in the repo: content, or what holds it
    adapters: Sequence[Mapping[str, Any]]  # facts of each, as the uploaded configs say them
    changes: Sequence[str]  # what these say otherwise than those on the disk, one line each

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def collect(
    adapter: str, repo: RepoName, k: int | None = None, base_model: str | None = None
) -> Upload:
    """Reads and checks what is to go up; nothing is sent yet.

    Args:
        adapter: An adapter folder, a folder of them, or ``bundled``.
        repo: Where to.
        k: The one merge factor wanted, or None: all there are.
        base_model: The base's repo id; None takes what the adapters name.

    Raises:
        AdapterError: No adapter, a torn one, or no such K.
        UploadError: The base has no name that others can use.
    """
    if adapter != BUNDLED and not Path(adapter).is_dir():
        raise UploadError(f"{adapter} is not a folder: give the adapter folder to upload")
    found = look_up(adapter)
    chosen = [found.choose(factor) for factor in ([k] if k is not None else found.found)]
    if any(is_carried(folder) for folder, _ in chosen):
        raise UploadError(
            f"{adapter} carries its adapter, which needs the model around it: upload the whole "
            f"folder (`hf upload {repo.id} {adapter}`), or the adapter that it was made from"
        )
    on_hub = _base_on_hub(adapter, [merge for _, merge in chosen], base_model)
    files: dict[str, bytes | Path] = {}
    adapters, changes = [], []
    for folder, merge in chosen:
        inside = "" if folder == Path(adapter) else f"k{merge.merge_factor}/"
        configs, changed = _configs(folder, on_hub)
        changes += [f"{inside}{line}" for line in changed]
        files |= {f"{inside}{name}": configs.get(name, folder / name) for name in FILES}
        provenance = json.loads(configs[MERGE_CONFIG]).get("provenance") or {}
        facts = describe_adapter(read_adapter(folder, merge))
        adapters.append(facts | {"base_model": on_hub, "provenance": provenance})
    fields = chosen[0][1].base.fields
    return Upload(repo, BaseModelConfig(on_hub, fields), files, adapters, changes)


def check_base(upload: Upload) -> None:
    """Refuses a base that is not on the hub, or not the one that the adapters were made for.

    Raises:
        UploadError: With what the hub said, or every difference.
    """
    name = upload.base.id
    if name == BUNDLED:
        return
    try:
        config = base.read_config(fetch(name, ["config.json"], UploadError))
    except KMergeError as error:
        raise UploadError(
            f"the adapter goes up as made on {name}, which cannot be fetched: {error} "
            "(`base_model` names another)"
        ) from error
    if problems := upload.base.differences(base.fingerprint(config)):
        raise UploadError(findings(f"{name} is not the base of this adapter", problems))


def send(upload: Upload, message: str, private: bool) -> tuple[str, list[str]]:
    """Uploads in one commit, into a repo that is made if it is not there.

    Returns:
        The address of the commit, and what the hub finds odd in the card.

    Raises:
        UploadError: With one line, whatever the hub said; nothing is in the repo then.
    """
    quiet()
    try:
        with warnings.catch_warnings(record=True) as odd:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)  # the others are for programmers
            address = _send(upload, message, private)
    except UploadError:
        raise
    except Exception as error:  # the hub client's errors share no base with the network's
        raise UploadError(f"{upload.repo}: {why(error, 'write')}") from error
    return address, [" ".join(str(warning.message).split()) for warning in odd]


def _send(upload: Upload, message: str, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api = HfApi(library_name="kmerge-mlx", library_version=__version__)
    repo, branch = upload.repo.id, upload.repo.revision
    api.create_repo(repo, private=True if private else None, exist_ok=True)
    about = api.repo_info(repo)
    if private and not about.private:
        raise UploadError(f"{repo} is there and public: leave `private` out, or make it private")
    if branch is not None:
        try:
            about = api.repo_info(repo, revision=branch)
        except errors.RevisionNotFoundError:
            api.create_branch(repo, branch=branch, exist_ok=True)
    there = {file.rfilename for file in about.siblings or ()}
    configs = {name for name in there if name.rpartition("/")[2] == MERGE_CONFIG}
    # A config at the root hides all in folders.
    others = configs - {MERGE_CONFIG} if MERGE_CONFIG in upload.files else configs & {MERGE_CONFIG}
    if others:
        raise UploadError(
            f"{upload.repo} holds {min(others)}: with the adapter that is to go up beside it, one "
            "of the two would not be found; choose another repo or `revision`, or delete that one"
        )
    files = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
    commit = api.create_commit(repo, files, commit_message=message, revision=branch)
    return str(commit.commit_url)


def _base_on_hub(adapter: str, merges: Sequence[MergeConfig], given: str | None) -> str:
    """What the base is called where others can find it."""
    if given is not None:
        return str(parse(given, UploadError))
    recorded = {merge.base.id for merge in merges}
    if len(recorded) > 1:
        listed = " and ".join(sorted(map(str, recorded)))
        raise UploadError(f"{adapter} names several bases ({listed}): choose one with `k`")
    (name,) = recorded
    if name is None:
        raise UploadError(f"{adapter} does not name its base model: give `base_model` user/name")
    if name == BUNDLED:
        return name
    if is_namespaced(name) and not Path(name).exists():
        return str(parse(name, UploadError))
    raise UploadError(
        f"{adapter} was made on {name}, which is not a hub repo id: give the base's, as "
        "`base_model` user/name"
    )


def _configs(folder: Path, on_hub: str) -> tuple[dict[str, bytes], list[str]]:
    """An adapter's two configs as they go up, and what they say otherwise than on the disk."""
    merge = read_json(folder / MERGE_CONFIG, UploadError)
    tuning = read_json(folder / TUNING_CONFIG, UploadError)
    changes: list[str] = []
    entry = merge.get("base_model") or {}
    if entry.get("id") != on_hub:
        changes.append(f"{MERGE_CONFIG}: base_model.id is {entry.get('id')}, goes up as {on_hub}")
    merge["base_model"], tuning["model"] = entry | {"id": on_hub}, on_hub
    configs = {MERGE_CONFIG: merge, TUNING_CONFIG: tuning}
    texts = {}
    for name, config in configs.items():
        cut = {key: _without_paths(config[key], f"{name}: {key}", changes) for key in config}
        texts[name] = (json.dumps(cut, indent=2) + "\n").encode()
    return texts, changes


def _without_paths(value: Any, where: str, changes: list[str]) -> Any:
    """The same with each path of this machine cut down to its last part."""
    if isinstance(value, dict):
        return {name: _without_paths(v, f"{where}.{name}", changes) for name, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner, where, changes) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "..")) and "\n" not in value:
        cut = _last_part(value)
    else:
        cut = _PATH.sub(lambda match: _last_part(match[0]), value)
    if cut != value:
        changes.append(f"{where} is {' '.join(value.split())}, goes up as {cut}")
    return cut


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or "/"
