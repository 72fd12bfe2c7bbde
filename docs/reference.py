"""Writes docs/cli.md, docs/api.md and the README's map of files from the code.

python docs/reference.py           # writes them
python docs/reference.py --check   # exits with 1 where one of them is not what this writes
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import kmerge_mlx

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
WIDTH = 100

# What is public beside the names of the package itself, by module.
FURTHER = {
    "generation.stream": ("GenerationResponse", "BatchResponse"),
    "virtual_tokens": ("CompressedPrompt",),
    "generation.conversation": ("Conversation", "History"),
    "prompts.tags": ("parse", "escape", "Span"),
    "adapters.folder": ("Adapter", "load_adapter", "save_adapter", "find_adapters"),
    "adapters.schema": (
        *("MergeConfig", "EncoderConfig", "LoRASpec", "BaseModelConfig"),
        *("LoRAConfig", "FullConfig"),
    ),
    "convert.checkpoint": ("convert_checkpoint",),
    "serving.settings": ("ServeSettings",),
    "serving.app": ("Server",),
    "errors": (
        *("KMergeError", "CheckpointError", "AdapterError", "ModelError", "PromptError"),
        *("DataError", "TrainError", "EvaluateError", "PlotError", "ServeError"),
        "BlockTableFullError",
    ),
}
_SECTIONS = ("Args", "Returns", "Yields", "Raises", "Source")
_MAP_BEGIN, _MAP_END = "<!-- map -->\n", "<!-- end of map -->\n"
_COLUMN = 28
_WRITTEN = "<!-- written by docs/reference.py -->\n"


def cli_page() -> str:
    """Every command's help, as the terminal shows it."""
    from typer.main import get_command

    from kmerge_mlx.cli import app

    group = get_command(app)
    pages = {"kmerge-mlx": group}
    pages |= {f"kmerge-mlx {name}": command for name, command in sorted(group.commands.items())}
    parts = [_WRITTEN + "# The command line"]
    for name, command in pages.items():
        sizes = {"terminal_width": WIDTH, "max_content_width": WIDTH}
        context = command.make_context(name, [], resilient_parsing=True, **sizes)
        text = "\n".join(line.rstrip() for line in context.get_help().splitlines())
        parts.append(f"## {name}\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """The docstrings of the public names."""
    parts = [
        _WRITTEN + "# The Python API",
        "Shapes: B batch, T tokens, K merge factor, N blocks, D hidden size, V vocabulary size.",
    ]
    own = [name for name in kmerge_mlx.__all__ if not name.startswith("_")]
    for title, module, names in [
        ("kmerge_mlx", kmerge_mlx, own),
        *(
            (f"kmerge_mlx.{place}", import_module(f"kmerge_mlx.{place}"), names)
            for place, names in FURTHER.items()
        ),
    ]:
        parts.append(f"## {title}")
        for name in names:
            parts += _entry(name, getattr(module, name))
    return "\n\n".join(parts) + "\n"


def _entry(name: str, thing: Any) -> Iterator[str]:
    """A function, or a class and its public methods."""
    yield f"### {name}\n\n{_signature(name, thing)}{_body(thing)}"
    if not inspect.isclass(thing):
        return
    for part, value in vars(thing).items():
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        documented = inspect.isfunction(value) or isinstance(value, property)
        if documented and value.__doc__ and not part.startswith("_"):
            called = "" if isinstance(value, property) else _signature(f"{name}.{part}", value)
            yield f"#### {name}.{part}\n\n{called}{_body(value)}"


def _signature(name: str, thing: Any) -> str:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return ""
    parameters = [
        p.replace(annotation=p.empty)
        for p in inspect.signature(thing).parameters.values()
        if p.name not in ("self", "cls")
    ]
    arguments = str(inspect.Signature(parameters))
    arguments = re.sub(r"=<factory>", "=...", arguments)
    arguments = re.sub(r"=(\w+\(.*?\))(?=[,)])", "=...", arguments)
    lines = f"{name}{arguments}"
    if len(lines) > WIDTH:
        inside = ",\n    ".join(str(p) for p in _marked(parameters))
        lines = f"{name}(\n    {inside},\n)"
    return f"```text\n{lines}\n```\n\n"


def _marked(parameters: list[inspect.Parameter]) -> Iterator[str]:
    """Parameters as they are written, with the star before those by name alone."""
    starred = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        starred = starred or parameter.kind is parameter.VAR_POSITIONAL
        text = re.sub(r"=<factory>", "=...", str(parameter))
        yield re.sub(r"=(\w+\(.*\))$", "=...", text)


def _body(thing: Any) -> str:
    """A docstring in Google style as Markdown."""
    lines = inspect.getdoc(thing).splitlines()
    found: list[str] = []
    section = ""
    for line in lines:
        title = line.removesuffix(":")
        if line.endswith(":") and title in _SECTIONS:
            section = title
            found += [f"*{title}*", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            entry = re.match(r"    (\**\w+)(?: \(.*?\))?: (.*)", line)
            text = f"`{entry[1]}`: {entry[2]}" if entry else line.strip()
            listed = entry and section in ("Args", "Raises")
            found.append(f"- {text}" if listed else text)
        else:
            found.append(f"  {line.strip()}" if section and line.strip() else line)
    return re.sub(r"``(.+?)``", r"`\1`", re.sub(r":\w+:`~?([^`]+)`", r"`\1`", "\n".join(found)))


def readme() -> str:
    """The README with the map of files: the first line of each module's docstring."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(_MAP_BEGIN)
    return before + _MAP_BEGIN + "```text\n" + _map() + "```\n" + _MAP_END + rest.split(_MAP_END)[1]


def _map() -> str:
    lines = []
    for top in ("kmerge_mlx", "convert"):
        files = sorted((HERE.parent / top).rglob("*.py"), key=_place)
        for file in files:
            own = file.name == "__init__.py"
            at = file.parent if own else file
            depth = len(at.relative_to(HERE.parent).parts) - 1
            name = "  " * depth + at.name + "/" * own
            lines.append(f"{name:<{_COLUMN}}{_first_line(file)}".rstrip() + "\n")
    return "".join(lines)


def _place(file: Path) -> tuple[tuple[bool, str], ...]:
    """A folder's own line first, then its files, then the folders in it."""
    parts = file.relative_to(HERE.parent).parts
    return tuple((part != "__init__.py", "." not in part, part) for part in parts)


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("``", "").removesuffix(".")


PAGES = {"docs/cli.md": cli_page, "docs/api.md": api_page, "README.md": readme}


def main(check: bool) -> int:
    """Writes the pages, or only compares them; returns the exit code."""
    stale = []
    for name, page in PAGES.items():
        file, text = HERE.parent / name, page()
        if check and file.read_text(encoding="utf-8") != text:
            stale.append(name)
        elif not check:
            file.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name} is not what the code says: run python docs/reference.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
