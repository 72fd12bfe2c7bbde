"""The model card that ``kmerge-mlx upload`` writes.

Owns its wording and its metadata. Everything in it comes from the adapters' own files, from
``evaluate --json``, or from the command line.

Source: https://huggingface.co/docs/hub/model-cards (the metadata's keys).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.cli.evaluated import COLUMNS, cell
from kmerge_mlx.cli.info import encoder_line, tuning_lines
from kmerge_mlx.data import amazon_reviews, commitpackft
from kmerge_mlx.evaluation.saved import SavedReport, SavedRow
from kmerge_mlx.evaluation.settings import MERGED
from kmerge_mlx.hub.fetch import is_namespaced, parse
from kmerge_mlx.prompts.policy import ALL
from kmerge_mlx.tools.upload import Upload

PAPER = "https://arxiv.org/abs/2604.15153"
TAGS = ("mlx", "kmerge-mlx", "k-token-merging", "prompt-compression")
DATASETS = {"amazon-reviews": amazon_reviews.REPO, "commitpackft": commitpackft.REPO}


def card(upload: Upload, license: str, data: Sequence[str], reports: Sequence[SavedReport]) -> str:
    """The card of what goes up.

    Args:
        upload: What goes up.
        license: Its licence, a hub identifier.
        data: What it was trained on: hub datasets, or sentences; none: what the adapters say.
        reports: Evaluations of it.
    """
    data = data or _recorded_data(upload)
    head = yaml.safe_dump(
        _metadata(upload, license, data, reports), sort_keys=False, allow_unicode=True
    )
    parts = [_introduction(upload), _use(upload), _data(data), *_metrics(upload, reports)]
    return f"---\n{head}---\n\n" + "\n\n".join([*parts, _provenance(upload), _limits()]) + "\n"


def _metadata(
    upload: Upload, license: str, data: Sequence[str], reports: Sequence[SavedReport]
) -> dict[str, Any]:
    tuned = {"lora" for facts in upload.adapters if facts["lora_modules"]}
    found: dict[str, Any] = {
        "license": license,
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
    }
    if upload.base.id != BUNDLED:
        found["base_model"] = upload.base.id.partition("@")[0]
        found["base_model_relation"] = "adapter"
    found["tags"] = [*TAGS, *sorted(tuned)]
    if datasets := [text for text in data if is_namespaced(text)]:
        found["datasets"] = datasets
    if results := [result for report in reports for result in _results(upload, report)]:
        name = upload.repo.id.rpartition("/")[2]
        found["model-index"] = [{"name": name, "results": results}]
    return found


def _results(upload: Upload, report: SavedReport) -> Iterator[dict[str, Any]]:
    """The measured scores as the hub's ``model-index`` has them."""
    name, kind = _measured_on(report)
    for group in report.groups:
        metrics = [
            {"type": metric, "value": round(score.value, 6), "name": f"{metric} (K={row.k})"}
            for row in rows_of(upload, report)
            for metric, score in row.scores[group].items()
            if row.method == MERGED and metric in COLUMNS and math.isfinite(score.value)
        ]
        if metrics:
            dataset = {"name": f"{name}: {group.replace('_', ' ')}", "type": kind}
            yield {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


def rows_of(upload: Upload, report: SavedReport) -> list[SavedRow]:
    """The rows of an evaluation that say something of what goes up, baselines included."""
    ks = {1, *(facts["merge_factor"] for facts in upload.adapters)}
    return [row for row in report.rows if row.k in ks]


def _introduction(upload: Upload) -> str:
    name, ks = upload.repo.id.rpartition("/")[2], _ks(upload)
    rows = []
    for facts in upload.adapters:
        tuning = "; ".join(f"{kind}: {line}" for kind, line in tuning_lines(facts).items())
        layout = _layout(facts["layout"])
        rows.append(_row([str(facts["merge_factor"]), encoder_line(facts), tuning, layout]))
    factor = " or ".join(map(str, ks))
    table = [_row(["K", "merge encoder", "changes to the base", "trained on prompts"]), _rule(4)]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Reads {factor} prompt tokens in one position of {_base(upload)}: an adapter for "
            f"[K-Token Merging]({PAPER}), run by kmerge-mlx on Apple's MLX.",
            "",
            *table,
            *rows,
        ]
    )


def _base(upload: Upload) -> str:
    if upload.base.id == BUNDLED:
        return "the model that comes with kmerge-mlx"
    repo = parse(upload.base.id, ValueError)
    link = f"[{repo.id}](https://huggingface.co/{repo.id})"
    return link if repo.revision is None else f"{link} (revision `{repo.revision}`)"


def _layout(layout: Mapping[str, Any] | None) -> str:
    if layout is None:
        return "laid out in a way that was not recorded"
    merges = (
        "all of which merges"
        if layout["merges"] == ALL
        else f"whose contexts of {layout['threshold']} tokens or more merge"
    )
    return f"{merges}, {'with' if layout['chat_template'] else 'without'} the chat template"


def _use(upload: Upload) -> str:
    k = _ks(upload)[-1]
    return "\n".join(
        [
            "## Use",
            "",
            "```sh",
            "pip install kmerge-mlx",
            f"kmerge-mlx generate --adapter-path {upload.repo} --k {k} prompt.txt",
            "```",
            "",
            "```python",
            "from kmerge_mlx import generate, load",
            "",
            f'model, tokenizer = load("{upload.base.id}", "{upload.repo}", {k})',
            "print(generate(model, tokenizer, prompt))",
            "```",
        ]
    )


def _data(data: Sequence[str]) -> str:
    lines = [
        f"- [{text}](https://huggingface.co/datasets/{text})"
        if is_namespaced(text)
        else f"- {text}"
        for text in data
    ]
    return "\n".join(["## Training data", "", *(lines or ["Not stated."])])


def _recorded_data(upload: Upload) -> list[str]:
    """What the adapters say that they were trained on."""
    said = [facts["provenance"].get("data") for facts in upload.adapters]
    texts = dict.fromkeys(DATASETS.get(text, text) for text in said if isinstance(text, str))
    # A folder's name may look like a dataset's: only the tasks' are known to be on the hub.
    return [text if text in DATASETS.values() else f"`{text}`" for text in texts]


def _metrics(upload: Upload, reports: Sequence[SavedReport]) -> Iterator[str]:
    if not reports:
        return
    yield "## Metrics\n\nWith 95% intervals. `ratio` is prompt tokens to positions read."
    for report in reports:
        for group, questions in report.groups.items():
            yield _table(upload, report, group, questions)


def _table(upload: Upload, report: SavedReport, group: str, questions: int) -> str:
    rows = rows_of(upload, report)
    shown = [name for name in COLUMNS if all(name in row.scores[group] for row in rows)]
    heads = [name.replace("_", " ").replace("f1", "F1") for name in shown]
    settings = report.settings
    how = [f"{name} {settings[name]}" for name in ("split", "data_seed") if name in settings]
    title = (
        f"{_measured_on(report)[0]}, {group.replace('_', ' ')}: {questions:,} questions "
        f"({', '.join(how).replace('data_seed', 'seed')}; kmerge-mlx {report.version})"
    )
    lines = [_row(["", "ratio", *heads]), _rule(len(heads) + 2)]
    for row in rows:
        cells = [cell(name, row.scores[group][name]) for name in shown]
        lines.append(_row([row.label, f"{row.compression_ratio:.2f}x", *cells]))
    return "\n".join([title, "", *lines])


def _measured_on(report: SavedReport) -> tuple[str, str]:
    """What an evaluation asked about: a name for people, and the hub's name or one like it."""
    task, data = report.settings.get("task"), str(report.settings.get("data"))
    if isinstance(task, str):
        return (DATASETS.get(task, task),) * 2
    if is_namespaced(data) and not Path(data).exists():
        return data, data.partition("@")[0]
    return (Path(data).name or "data",) * 2


def _provenance(upload: Upload) -> str:
    parts = ["## Provenance"]
    for facts in upload.adapters:
        text = json.dumps(facts["provenance"], indent=2, ensure_ascii=False)
        parts.append(f"K = {facts['merge_factor']}:\n\n```json\n{text}\n```")
    return "\n\n".join(parts)


def _limits() -> str:
    return "\n".join(
        [
            "## Limits",
            "",
            "- Made for prompts like those it was trained on, laid out as they were.",
            "- Refused on a base of other sizes; a fine-tune of the same base is not told apart.",
            "- mlx-lm alone loads the changes to the base, but not the encoder: nothing merges.",
            "- The base model's own licence and limits apply as well.",
        ]
    )


def _ks(upload: Upload) -> list[int]:
    return [facts["merge_factor"] for facts in upload.adapters]


def _row(cells: Sequence[str]) -> str:
    escaped = (text.replace("|", "\\|").replace("\n", " ") for text in cells)
    return f"| {' | '.join(escaped)} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
