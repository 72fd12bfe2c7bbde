"""``kmerge-mlx upload``: an adapter and its card to a hub repo, in one commit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kmerge_mlx.cli.inputs import command
from kmerge_mlx.cli.output import note
from kmerge_mlx.errors import UploadError
from kmerge_mlx.settings import ModelSettings, Settings, argument, option

if TYPE_CHECKING:
    from kmerge_mlx.evaluation.report import Report
    from kmerge_mlx.tools.upload import Upload


@dataclass(frozen=True)
class UploadSettings(Settings):
    """What to upload, where to, and what its card says."""

    NAME = "upload"

    adapter: str = argument("ADAPTER", "Adapter folder, or a folder of several (k2/, k4/).")
    repo: str = argument("REPO", "Hub repo, user/name; made if it is not there.")
    license: str | None = option(
        None, str, "The card's licence: mit, apache-2.0, other, ...", required=True
    )
    k: int | None = ModelSettings.setting(
        "k", help="Upload this merge factor alone. Default: all there are."
    )
    base_model: str | None = option(
        None, str, "The base's repo id, where the adapter names a local folder."
    )
    data: tuple[str, ...] = option(
        (),
        str,
        "What it was trained on, a hub dataset or a sentence; may be given again. Default: what "
        "the adapter says.",
        many=True,
    )
    metrics: tuple[str, ...] = option(
        (),
        str,
        "What `kmerge-mlx evaluate --json` printed, for the card; may be given again.",
        many=True,
    )
    private: bool = option(False, bool, "Into a private repo, or not at all.")
    revision: str | None = option(
        None, str, "Branch to upload to; made if it is not there. Default: the repo's own."
    )
    commit_message: str = option("Upload with kmerge-mlx", str, "Message of the commit.")
    dry_run: bool = option(
        False, bool, "Print the card on stdout and the files on stderr; upload nothing."
    )

    def clashes(self) -> list[str]:
        odd = any(not text.isprintable() or not text.strip() for text in self.data)
        return ["`data` is not printable text"] if odd else []


@command(UploadSettings)
def upload(settings: UploadSettings) -> None:
    """Upload an adapter to the Hugging Face hub, with a model card.

    The adapter's four files and a README.md, in one commit; nothing else of the folder. Local paths
    do not go up. The token is the hub client's: HF_TOKEN, or `hf auth login`.

    \b
    Examples:
      kmerge-mlx upload ./adapter me/my-adapter --license mit --dry-run
      kmerge-mlx evaluate --adapter-path ./adapter --data ./data --json > evaluate.json
      kmerge-mlx upload ./adapter me/my-adapter --license mit --metrics evaluate.json --private
    """
    from kmerge_mlx.evaluation.report import read_report
    from kmerge_mlx.hub import is_namespaced, parse
    from kmerge_mlx.tools.upload import CARD, card, check_base, collect, send

    if not is_namespaced(settings.repo):
        raise UploadError(f"{settings.repo} is not a hub repo id: expected user/name")
    name = parse(settings.repo, UploadError, settings.revision)
    planned = collect(settings.adapter, name, settings.k, settings.base_model)
    reports = {path: read_report(Path(path)) for path in settings.metrics}
    _check_metrics(settings.adapter, planned, reports)
    text = card(planned, settings.license.lower(), settings.data, list(reports.values()))
    planned = replace(planned, files={CARD: text.encode(), **planned.files})
    for change in planned.changes:
        note(f"note: {change}")
    if settings.dry_run:
        for file, size in planned.sizes().items():
            note(f"{file}  {size:,} bytes")
        print(text, end="")
        note(f"Nothing was uploaded: without --dry-run, this goes to {planned.repo}")
        return
    check_base(planned)
    address, odd = send(planned, settings.commit_message, settings.private)
    for warning in odd:
        note(f"note: {warning}")
    total = sum(planned.sizes().values())
    note(f"{address}: {len(planned.files)} files, {total / 1e6:.1f} MB")


def _check_metrics(adapter: str, planned: Upload, reports: dict[str, Report]) -> None:
    """Refuses an evaluation of another K; says where one is of another folder."""
    ks = [facts["merge_factor"] for facts in planned.adapters]
    for path, report in reports.items():
        if not {row.k for row in report.rows} & set(ks):
            measured = ", ".join(sorted({str(row.k) for row in report.rows})) or "nothing"
            raise UploadError(
                f"{path} measured K = {measured}, what goes up has K = {', '.join(map(str, ks))}"
            )
        measured = Path(str(report.settings.get("adapter_path")))
        if measured.is_dir() and Path(adapter).is_dir() and not measured.samefile(adapter):
            note(f"note: {path} measured {measured}, not {adapter}")
