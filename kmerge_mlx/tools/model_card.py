"""Writes the model card that ``kmerge-mlx upload`` puts beside an adapter.

Source: https://huggingface.co/docs/hub/model-cards (the metadata, by ``huggingface_hub``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmerge_mlx.bundled import BUNDLED
from kmerge_mlx.data import HUB_TASKS
from kmerge_mlx.evaluation.report import COLUMNS, Report, Row, cell
from kmerge_mlx.evaluation.settings import MERGED
from kmerge_mlx.hub.fetch import is_namespaced, parse
from kmerge_mlx.prompts.policy import ALL
from kmerge_mlx.tools.describe import encoder_line, tuning_lines
from kmerge_mlx.tools.upload import Upload

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PAPER = "https://arxiv.org/abs/2604.15153"
TAGS = ("mlx", "kmerge-mlx", "k-token-merging", "prompt-compression")
DATASETS = {name: task.repo for name, task in HUB_TASKS.items()}

LIMITS = """## Limits

- Made for prompts like those it was trained on, laid out as they were.
- Refused on a base of other sizes; a fine-tune of the same base is not told apart.
- mlx-lm alone loads the changes to the base, but not the encoder: nothing merges.
- The base model's own licence and limits apply as well."""


def card(upload: Upload, license: str, data: Sequence[str], reports: Sequence[Report]) -> str:
    """The card of what goes up.

    Args:
        upload: What goes up.
        license: Its licence, a hub identifier.
        data: What it was trained on: hub datasets, or sentences; empty: what the adapters say.
        reports: Evaluations of it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = data or _recorded_data(upload)
    lora = ["lora"] if any(facts["lora_modules"] for facts in upload.adapters) else []
    base = {}
    if upload.base.id != BUNDLED:
        base["base_model"] = upload.base.id.partition("@")[0]
        base["base_model_relation"] = "adapter"
    results = [result for report in reports for result in _results(upload, report)]
    head = ModelCardData(
        license=license,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=[*TAGS, *lora],
        datasets=[text for text in data if is_namespaced(text)] or None,
        model_name=upload.repo.id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **base,
    )
    parts = [_introduction(upload), _use(upload), _data(data), *_metrics(upload, reports)]
    body = "\n\n".join([*parts, _provenance(upload), LIMITS])
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}\n"))


def _results(upload: Upload, report: Report) -> Iterator[EvalResult]:
    """The measured scores, for the card's metadata."""
    from huggingface_hub import EvalResult

    name, kind = _measured_on(report)
    for group in report.groups:
        for row in _rows_of(upload, report):
            for metric, score in row.scores[group].items():
                if row.method == MERGED and metric in COLUMNS and math.isfinite(score.value):
                    yield EvalResult(
                        task_type="text-generation",
                        dataset_type=kind,
                        dataset_name=f"{name}: {group.replace('_', ' ')}",
                        metric_type=metric,
                        metric_value=round(score.value, 6),
                        metric_name=f"{metric} (K={row.k})",
                    )


def _rows_of(upload: Upload, report: Report) -> list[Row]:
    """The rows of an evaluation that say something of what goes up, baselines included."""
    ks = {1, *(facts["merge_factor"] for facts in upload.adapters)}
    return [row for row in report.rows if row.k in ks]


def _introduction(upload: Upload) -> str:
    base = "the model that comes with kmerge-mlx"
    if upload.base.id != BUNDLED:
        repo = parse(upload.base.id, ValueError)
        base = f"[{repo.id}](https://huggingface.co/{repo.id})"
        base += "" if repo.revision is None else f" (revision `{repo.revision}`)"
    factors = " or ".join(str(facts["merge_factor"]) for facts in upload.adapters)
    lines = [
        f"# {upload.repo.id.rpartition('/')[2]}",
        "",
        f"Reads {factors} prompt tokens in one position of {base}: an adapter for "
        f"[K-Token Merging]({PAPER}), run by kmerge-mlx on Apple's MLX.",
        "",
    ]
    rows = [["K", "merge encoder", "changes to the base", "trained on prompts"]]
    for facts in upload.adapters:
        tuning = "; ".join(f"{kind}: {line}" for kind, line in tuning_lines(facts).items())
        k, layout = str(facts["merge_factor"]), _layout(facts["layout"])
        rows.append([k, encoder_line(facts), tuning, layout])
    return "\n".join([*lines, _table(rows)])


def _layout(layout: Mapping[str, Any] | None) -> str:
    if layout is None:
        return "laid out in a way that was not recorded"
    merges = f"whose contexts of {layout['threshold']} tokens or more merge"
    merges = "all of which merges" if layout["merges"] == ALL else merges
    return f"{merges}, {'with' if layout['chat_template'] else 'without'} the chat template"


def _use(upload: Upload) -> str:
    k = upload.adapters[-1]["merge_factor"]
    return f"""## Use

```sh
pip install kmerge-mlx
kmerge-mlx generate --adapter-path {upload.repo} --k {k} prompt.txt
```

```python
from kmerge_mlx import generate, load

model, tokenizer = load("{upload.base.id}", "{upload.repo}", {k})
print(generate(model, tokenizer, prompt))
```"""


def _data(data: Sequence[str]) -> str:
    linked = [
        f"- [{text}](https://huggingface.co/datasets/{text})"
        if is_namespaced(text)
        else f"- {text}"
        for text in data
    ]
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
                f"{_measured_on(report)[0]}, {group.replace('_', ' ')}: {questions:,} questions "
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
    return (Path(data).name or "data",) * 2


def _provenance(upload: Upload) -> str:
    parts = ["## Provenance"]
    for facts in upload.adapters:
        text = json.dumps(facts["provenance"], indent=2, ensure_ascii=False)
        parts.append(f"K = {facts['merge_factor']}:\n\n```json\n{text}\n```")
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for cells in rows:
        escaped = (text.replace("|", "\\|").replace("\n", " ") for text in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
