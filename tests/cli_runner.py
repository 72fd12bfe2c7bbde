"""Runs ``kmerge-mlx``: in this process, which is quick, or in one of its own, which is real."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from kmerge_mlx.cli import main


@dataclass
class Result:
    """How a command ended: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


class Stream(io.TextIOWrapper):
    """A standard stream that keeps what is written to it, and may pose as a terminal."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = False):
        super().__init__(io.BytesIO(), encoding, newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        """All that was written."""
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


def run(
    *args: object, stdin: bytes | None = b"", encoding: str = "utf-8", terminal: bool = False
) -> Result:
    """Runs a command in this process; ``stdin`` None is a closed one, stderr may be a terminal."""
    out, err = Stream(encoding), Stream(terminal=terminal)
    given = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    argv = ["kmerge-mlx", *map(str, args)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "stdin", given),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            code: object = 0
        except SystemExit as end:
            code = end.code or 0
    assert isinstance(code, int)
    return Result(code, out.text(), err.text())


PLAIN_USER = Path(__file__).parent / "plain_user"
"""On PYTHONPATH, it hides PyTorch."""


def command(*args: object) -> list[str]:
    """The command line that runs ``kmerge-mlx`` in a process of its own."""
    return [sys.executable, "-m", "kmerge_mlx", *map(str, args)]


def environment(**changes: str) -> dict[str, str]:
    """A plain user's environment: no hub settings, output buffered as Python does by default."""
    dropped = ("HF_", "PYTHONUNBUFFERED", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"HF_HUB_OFFLINE": "1"} | changes


def run_process(*args: object, cwd: Path | None = None, **changes: str) -> Result:
    """Runs a command in a process of its own."""
    done = subprocess.run(
        command(*args),
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_one_error(result: Result, code: int, *fragments: str) -> None:
    """Checks the contract of every error: one message, the exit code, nothing on stdout."""
    lines = result.err.splitlines()
    assert "Traceback" not in result.err, result.err
    assert [line for line in lines if line.startswith("error: ")], result.err
    # A list of findings is indented under its summary.
    assert all(line.startswith(("error: ", "note: ", "  - ")) for line in lines), result.err
    assert sum(line.startswith("error: ") for line in lines) == 1, result.err
    assert result.out == ""
    assert result.code == code
    for fragment in fragments:
        assert fragment in result.err


def no_room(monkeypatch: Any) -> None:
    """Lets every picture fail as on a full disk: what can be known before was checked before."""
    from matplotlib.figure import Figure

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", full)


def change_json(path: Path, **changes: object) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy_base(base: Path, folder: Path, template: str | None = None, **config: object) -> Path:
    """A copy of a base model with another chat template or other config entries."""
    shutil.copytree(base, folder)
    change_json(folder / "config.json", **config)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if think is defined and not think %}<think></think>{% endif -%}
{%- endif -%}
"""
