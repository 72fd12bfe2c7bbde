"""The command line: every command, and how its errors become one message and an exit code.

Generated text and ``--json`` objects go to stdout; statistics, progress, notes and errors go to
stderr. Exit code 1 is the input's fault, 2 the command line's, 130 is Ctrl-C. Heavy imports stay
inside the commands: ``--help`` imports neither mlx nor transformers.
"""

from __future__ import annotations

import io
import re
import sys
from typing import Annotated, NoReturn

import typer

from kmerge_mlx import __version__
from kmerge_mlx.cli.bench import bench
from kmerge_mlx.cli.cache import cache
from kmerge_mlx.cli.chat import chat
from kmerge_mlx.cli.convert import ConvertSettings, convert, export
from kmerge_mlx.cli.data import data
from kmerge_mlx.cli.evaluate import evaluate
from kmerge_mlx.cli.fuse import fuse, quantize
from kmerge_mlx.cli.generate import generate
from kmerge_mlx.cli.info import info
from kmerge_mlx.cli.output import Terminal
from kmerge_mlx.cli.serve import serve
from kmerge_mlx.cli.train import train
from kmerge_mlx.cli.upload import upload
from kmerge_mlx.errors import KMergeError, SettingsError, printable
from kmerge_mlx.hub import one_version
from kmerge_mlx.settings import Settings
from kmerge_mlx.train.settings import TrainSettings

app = typer.Typer(
    name="kmerge-mlx",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MLX_LM = {"lora": "train", "server": "serve", "cache_prompt": "cache", "benchmark": "bench"}
"""What mlx-lm calls a command, and what it is called here."""
NO_SUCH = r"No such (?:option|command):? '?([\w-]+)"

for _command in (
    *(bench, cache, chat, convert, data, evaluate, export, fuse),
    *(generate, info, quantize, serve, train, upload),
):
    app.command()(_command)


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """K-Token Merging on MLX: read a prompt in a quarter of the positions.

    \b
    Examples:
      kmerge-mlx generate --k 4 tree.txt
      kmerge-mlx convert ./checkpoint ./adapter --model Qwen/Qwen2.5-0.5B
      kmerge-mlx generate --adapter-path ./adapter --k 4 prompt.txt
      kmerge-mlx info ./adapter
      kmerge-mlx serve --adapter-path ./adapter --port 8000
      kmerge-mlx train --model Qwen/Qwen2.5-0.5B --data ./data --k 4 --adapter-path ./out
      kmerge-mlx upload ./out me/my-adapter --license mit
    """
    if version:
        print(f"kmerge-mlx {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def main() -> None:
    """Runs the command line; whatever went wrong becomes one message and an exit code."""
    if sys.stdout is None:
        _fail("stdout is closed: there is nowhere to write to", 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write what the terminal's encoding lacks: a `?` beats half an answer.
        sys.stdout.reconfigure(errors="replace")
    if sys.stdout.isatty():
        sys.stdout = Terminal(sys.stdout)
    try:
        with one_version():
            code = app(standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        if habit := _habit(error.format_message(), context):
            _fail(habit, error.exit_code)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        # A missing argument's choices come one to a line.
        _fail(" ".join(error.format_message().split()) + hint, error.exit_code)
    except KMergeError as error:
        _fail(str(error), 2 if isinstance(error, SettingsError) else 1)
    except OSError as error:
        # If stdout is what failed, Python would try it again at exit.
        sys.stdout = None
        _fail("" if isinstance(error, BrokenPipeError) else str(error), 1)
    raise SystemExit(code)


def _habit(message: str, context: typer.Context | None) -> str | None:
    """What to do instead of an option or a command that mlx-lm has and this project does not."""
    if context is None or not (found := re.search(NO_SUCH, message)):
        return None
    word, name = found[1], context.info_name
    if word in MLX_LM:
        return f"mlx-lm's {word} is `kmerge-mlx {MLX_LM[word]}` (see its --help)"
    elsewhere = {"train": TrainSettings, "convert": ConvertSettings}.get(name, Settings).ELSEWHERE
    advice = elsewhere.get(word.lstrip("-").replace("-", "_"))
    return advice and f"{word}: {advice}"


def _fail(message: str, code: int) -> NoReturn:
    if message:
        print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(code)
