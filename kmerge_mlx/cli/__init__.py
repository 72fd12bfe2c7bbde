"""The command line: parse, call the library, print. Nothing else in the package prints.

Generated text and ``--json`` objects go to stdout; statistics, progress, notes and errors go to
stderr. Exit code 1 is the input's fault, 2 the command line's. Heavy imports stay inside the
commands: ``--help`` imports neither mlx nor transformers.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kmerge_mlx._version import __version__
from kmerge_mlx.cli.convert import convert
from kmerge_mlx.cli.generate import generate
from kmerge_mlx.cli.info import info
from kmerge_mlx.errors import KMergeError

app = typer.Typer(
    name="kmerge-mlx",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert)
app.command()(generate)
app.command()(info)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kmerge-mlx {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """K-Token Merging on MLX: read a prompt in a quarter of the positions.

    \b
    Examples:
      kmerge-mlx convert ./checkpoint ./adapter --model Qwen/Qwen2.5-0.5B
      kmerge-mlx generate --adapter-path ./adapter --k 4 prompt.txt
      kmerge-mlx info ./adapter
    """


def main() -> None:
    """Runs the command line; whatever the input did wrong becomes one message and exit code 1."""
    try:
        app()
    except KMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
