"""Uploads adapters with a model card to a hub repo in one commit, without local paths.

An adapter's four files lie at the root of the repo, those of a folder of several under ``k{K}/``.

Source: https://huggingface.co/docs/hub/model-cards (the metadata, by ``huggingface_hub``).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmerge_mlx import __version__, base
from kmerge_mlx.adapters.folder import (
    ENCODER,
    FILES,
    MERGE_CONFIG,
    TUNING_CONFIG,
    is_carried,
    look_up,
    read_adapter,
)
from kmerge_mlx.adapters.portable import without_paths
from kmerge_mlx.adapters.schema import BaseModelConfig
from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.data import HUB_TASKS
from kmerge_mlx.data.sources import data_name
from kmerge_mlx.errors import KMergeError, UploadError, findings
from kmerge_mlx.evaluation.baselines import Merged
from kmerge_mlx.evaluation.report import COLUMNS, Report, Row, cell
from kmerge_mlx.files import read_json
from kmerge_mlx.hub import RepoName, fetch, is_namespaced, parse, quiet, why
from kmerge_mlx.tools.describe import describe_adapter, encoder_line, layout_line, tuning_lines

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2604.15153"
TAGS = ("mlx", "kmerge-mlx", "k-token-merging", "prompt-compression")
DATASETS = {name: task.repo for name, task in HUB_TASKS.items()}

LIMITS = """## Limits

- Made for prompts like those it was trained on, laid out as they were.
- Refused on a base of other sizes; a fine-tune of the same base is not told apart.
- mlx-lm alone loads the changes to the base, but not the encoder: nothing merges.
- The base model's own licence and limits apply as well."""


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
    """Reads and checks what is to go up (one K, or all there are); nothing is sent yet."""
    if adapter != BUNDLED and not Path(adapter).is_dir():
        raise UploadError(f"{adapter} is not a folder: give the adapter folder to upload")
    found = look_up(adapter)
    chosen = [found.choose(factor) for factor in ([k] if k is not None else found.found)]
    if any(is_carried(folder) for folder, _ in chosen):
        raise UploadError(
            f"{adapter} carries its adapter, which needs the model around it: upload the whole "
            f"folder (`hf upload {repo.id} {adapter}`), or the adapter that it was made from"
        )
    recorded = [merge.base.id for _, merge in chosen]
    on_hub = _base_on_hub(adapter, recorded) if base_model is None else base_model
    if on_hub != BUNDLED:
        on_hub = str(parse(on_hub, UploadError))
    files, adapters, changes = {}, [], []
    for folder, merge in chosen:
        inside = "" if folder == Path(adapter) else f"k{merge.merge_factor}/"
        configs, changed = _configs(folder, on_hub)
        changes += [f"{inside}{line}" for line in changed]
        texts = {name: (json.dumps(c, indent=2) + "\n").encode() for name, c in configs.items()}
        files |= {f"{inside}{name}": texts.get(name, folder / name) for name in FILES}
        if merge.has_window:
            names = sorted(path.name for path in (folder / ENCODER).iterdir())
            files |= {f"{inside}{ENCODER}/{name}": folder / ENCODER / name for name in names}
        facts = describe_adapter(read_adapter(folder, merge))
        facts["provenance"] = configs[MERGE_CONFIG].get("provenance") or {}
        adapters.append(facts | {"base_model": on_hub})
    fields = chosen[0][1].base.fields
    return Upload(repo, BaseModelConfig(on_hub, fields), files, adapters, changes)


def check_base(upload: Upload) -> None:
    """Refuses a base that is not on the hub, or not the one that the adapters were made for."""
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

    Returns the address of the commit, and what the hub finds odd in the card.
    """
    quiet()
    with warnings.catch_warnings(record=True) as odd:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)  # the others are for programmers
        try:
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


def _base_on_hub(adapter: str, recorded: Sequence[str | None]) -> str:
    """What the base is called where others can find it, by what the adapters recorded."""
    names = sorted(set(map(str, recorded)))
    if len(names) > 1:
        listed = " and ".join(names)
        raise UploadError(f"{adapter} names several bases ({listed}): choose one with `k`")
    if (name := recorded[0]) is None:
        raise UploadError(f"{adapter} does not name its base model: give `base_model` user/name")
    if name != BUNDLED and (not is_namespaced(name) or Path(name).exists()):
        raise UploadError(
            f"{adapter} was made on {name}, which is not a hub repo id: give the base's, as "
            "`base_model` user/name"
        )
    return name


def _configs(folder: Path, on_hub: str) -> tuple[dict[str, Any], list[str]]:
    """An adapter's two configs as they go up, and what they say otherwise than on the disk."""
    merge, tuning = (read_json(folder / n, UploadError) for n in (MERGE_CONFIG, TUNING_CONFIG))
    changes: list[str] = []
    entry = merge.get("base_model") or {}
    if entry.get("id") != on_hub:
        changes.append(f"{MERGE_CONFIG}: base_model.id is {entry.get('id')}, goes up as {on_hub}")
    merge["base_model"], tuning["model"] = entry | {"id": on_hub}, on_hub

    def changed(where: str, old: str, new: str) -> None:
        changes.append(f"{where} is {' '.join(old.split())}, goes up as {new}")

    configs = {MERGE_CONFIG: merge, TUNING_CONFIG: tuning}
    for name, config in configs.items():
        config |= {k: without_paths(v, changed, f"{name}: {k}") for k, v in config.items()}
    return configs, changes


def card(upload: Upload, license: str, data: Sequence[str], reports: Sequence[Report]) -> str:
    """The model card of what goes up.

    ``data`` is what it was trained on: hub datasets, or sentences; empty: what the adapters say.
    ``reports`` are evaluations of it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = [without_paths(text) for text in data] or _recorded_data(upload)
    lora = ["lora"] if any(facts["lora_modules"] for facts in upload.adapters) else []
    repo = None if upload.base.id == BUNDLED else upload.base.id.partition("@")[0]
    results = [result for report in reports for result in _results(upload, report)]
    head = ModelCardData(
        license=license,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=[*TAGS, *lora],
        datasets=[text for text in data if is_namespaced(text)] or None,
        model_name=upload.repo.id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        base_model=repo,
        **({"base_model_relation": "adapter"} if repo else {}),
    )
    parts = [_introduction(upload), _data(data), *_metrics(upload, reports), "## Provenance"]
    for facts in upload.adapters:
        text = json.dumps(facts["provenance"], indent=2, ensure_ascii=False)
        parts.append(f"K = {facts['merge_factor']}:\n\n```json\n{text}\n```")
    body = "\n\n".join([*parts, LIMITS])
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}\n"))


def _results(upload: Upload, report: Report) -> Iterator[Any]:
    """The measured scores, as the hub's ``EvalResult``, for the card's metadata."""
    from huggingface_hub import EvalResult

    name, kind = _measured_on(report)
    for group in report.groups:
        for row in _rows_of(upload, report):
            for metric, score in row.scores[group].items():
                if row.method == Merged.name and metric in COLUMNS and math.isfinite(score.value):
                    yield EvalResult(
                        task_type="text-generation",
                        dataset_type=kind,
                        dataset_name=_about(name, group, ": "),
                        metric_type=metric,
                        metric_value=round(score.value, 6),
                        metric_name=f"{metric} (K={row.k})",
                    )


def _rows_of(upload: Upload, report: Report) -> list[Row]:
    """The rows of an evaluation that say something of what goes up, baselines included."""
    ks = {1, *(facts["merge_factor"] for facts in upload.adapters)}
    return [row for row in report.rows if row.k in ks]


def _introduction(upload: Upload) -> str:
    made_on = "the model that comes with kmerge-mlx"
    if upload.base.id != BUNDLED:
        repo, _, revision = upload.base.id.partition("@")
        made_on = f"[{repo}](https://huggingface.co/{repo})"
        made_on += f" (revision `{revision}`)" if revision else ""
    factors = [str(facts["merge_factor"]) for facts in upload.adapters]
    rows = [["K", "merge encoder", "changes to the base", "laid out in training"]]
    for k, facts in zip(factors, upload.adapters, strict=True):
        tuning = "; ".join(f"{kind}: {line}" for kind, line in tuning_lines(facts).items())
        rows.append([k, encoder_line(facts), tuning, layout_line(facts) or "not recorded"])
    return f"""# {upload.repo.id.rpartition("/")[2]}

Reads {" or ".join(factors)} prompt tokens in one position of {made_on}: an adapter for \
[K-Token Merging]({PAPER}), run by kmerge-mlx on Apple's MLX.

{_table(rows)}

## Use

```sh
pip install kmerge-mlx
kmerge-mlx generate --adapter-path {upload.repo} --k {factors[-1]} prompt.txt
```

```python
from kmerge_mlx import generate, load

model, tokenizer = load("{upload.base.id}", "{upload.repo}", {factors[-1]})
print(generate(model, tokenizer, prompt))
```"""


def _data(data: Sequence[str]) -> str:
    link = "[{0}](https://huggingface.co/datasets/{0})"
    linked = [f"- {link.format(text) if is_namespaced(text) else text}" for text in data]
    return "\n".join(["## Training data", "", *(linked or ["Not stated."])])


def _recorded_data(upload: Upload) -> list[str]:
    """What the adapters say that they were trained on."""
    found = [facts["provenance"].get("data") for facts in upload.adapters]
    texts = dict.fromkeys(DATASETS.get(text, text) for text in found if isinstance(text, str))
    # A folder's name may look like a dataset's: only the tasks' are known to be on the hub.
    return [text if text in DATASETS.values() else f"`{text}`" for text in texts]


def _metrics(upload: Upload, reports: Sequence[Report]) -> Iterator[str]:
    if reports:
        yield "## Metrics\n\nWith 95% intervals. `ratio` is prompt tokens to positions read."
    for report in reports:
        settings, rows = report.settings, _rows_of(upload, report)
        how = [f"{name} {settings[name]}" for name in ("split", "data_seed") if name in settings]
        how = ", ".join(how).replace("data_seed", "seed")
        for group, questions in report.groups.items():
            title = (
                f"{_about(_measured_on(report)[0], group, ', ')}: {questions:,} questions "
                f"({how}; kmerge-mlx {report.version})"
            )
            shown = [name for name in COLUMNS if all(name in row.scores[group] for row in rows)]
            heads = [name.replace("_", " ").replace("f1", "F1") for name in shown]
            lines = [["", "ratio", *heads]]
            for row in rows:
                cells = [cell(name, row.scores[group][name]) for name in shown]
                lines.append([row.label, f"{row.compression_ratio:.2f}x", *cells])
            yield f"{title}\n\n{_table(lines)}"


def _measured_on(report: Report) -> tuple[str, str]:
    """What an evaluation asked about: a name for people, and the hub's name or one like it."""
    task, data = report.settings.get("task"), str(report.settings.get("data"))
    if isinstance(task, str):
        return (DATASETS.get(task, task),) * 2
    if is_namespaced(data) and not Path(data).exists():
        return data, data.partition("@")[0]
    return (data_name(data),) * 2


def _about(name: str, group: str, between: str) -> str:
    """What was asked about, and the group of it, where that is not all of it."""
    words = group.replace("_", " ")
    return name if name.rpartition("/")[2] == group else f"{name}{between}{words}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for cells in rows:
        escaped = (text.replace("|", "\\|").replace("\n", " ") for text in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
