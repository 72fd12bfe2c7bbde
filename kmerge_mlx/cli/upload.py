"""``kmerge-mlx upload``: an adapter and its card to a hub repo, in one commit."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kmerge_mlx.errors import UploadError

if TYPE_CHECKING:
    from kmerge_mlx.evaluation.saved import SavedReport
    from kmerge_mlx.tools.upload import Upload

# A hub identifier, such as apache-2.0; the hub knows which there are.
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")


def _license(text: str) -> str:
    if not _LICENSE.fullmatch(text):
        raise typer.BadParameter("expected a hub identifier such as mit, apache-2.0 or other")
    return text.lower()


def upload(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER", help="Adapter folder, or a folder of several (k2/, k4/)."
        ),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Hub repo, user/name; made if it is not there.")
    ],
    license: Annotated[
        str,
        typer.Option(
            "--license", callback=_license, help="The card's licence: mit, apache-2.0, other, ..."
        ),
    ],
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            "--merge-factor",
            min=1,
            help="Upload this merge factor alone. Default: all there are.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="ID",
            help="The base's repo id, where the adapter names a local folder.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            help="What it was trained on, a hub dataset or a sentence; may be given again. "
            "Default: what the adapter says.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        list[Path] | None,
        typer.Option(
            "--metrics",
            metavar="FILE",
            help="What `kmerge-mlx evaluate --json` printed, for the card; may be given again.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Into a private repo, or not at all.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            help="Branch to upload to; made if it is not there. Default: the repo's own.",
            show_default=False,
        ),
    ] = None,
    commit_message: Annotated[
        str, typer.Option("--commit-message", help="Message of the commit.")
    ] = "Upload with kmerge-mlx",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the card on stdout and the files on stderr; upload nothing."
        ),
    ] = False,
) -> None:
    """Upload an adapter to the Hugging Face hub, with a model card.

    The adapter's four files and a README.md, in one commit; nothing else of the folder. Local paths
    do not go up. The token is the hub client's: HF_TOKEN, or `hf auth login`.

    \b
    Examples:
      kmerge-mlx upload ./adapter me/my-adapter --license mit --dry-run
      kmerge-mlx evaluate --adapter-path ./adapter --data ./data --json > evaluate.json
      kmerge-mlx upload ./adapter me/my-adapter --license mit --metrics evaluate.json --private
    """
    # The heavy imports wait until the command line is known to be good.
    from kmerge_mlx.evaluation.saved import read_report
    from kmerge_mlx.hub.fetch import is_namespaced, parse
    from kmerge_mlx.tools.model_card import card
    from kmerge_mlx.tools.upload import CARD, check_base, collect, send

    if not is_namespaced(repo):
        raise UploadError(f"{repo} is no name of a hub repo: expected user/name")
    if any(not text.isprintable() or not text.strip() for text in data or ()):
        raise typer.BadParameter("expected printable text", param_hint="--data")
    name = parse(repo, UploadError, revision)
    planned = collect(adapter, name, k, base_model)
    reports = {path: read_report(path) for path in metrics or ()}
    _check_metrics(adapter, planned, reports)
    text = card(planned, license, data or (), list(reports.values()))
    planned = replace(planned, files={CARD: text.encode(), **planned.files})
    for change in planned.changes:
        print(f"note: {change}", file=sys.stderr)
    if dry_run:
        for file, size in planned.sizes().items():
            print(f"{file}  {size:,} bytes", file=sys.stderr)
        print(text, end="")
        return
    check_base(planned)
    address, odd = send(planned, commit_message, private)
    for warning in odd:
        print(f"note: {warning}", file=sys.stderr)
    total = sum(planned.sizes().values())
    print(f"{address}: {len(planned.files)} files, {total / 1e6:.1f} MB", file=sys.stderr)


def _check_metrics(adapter: str, planned: Upload, reports: dict[Path, SavedReport]) -> None:
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
            print(f"note: {path} measured {measured}, not {adapter}", file=sys.stderr)
