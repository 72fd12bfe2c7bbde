"""Every message that the package can raise, read from its source and never run.

Owns: what counts as a message. A message is a text of two words or more that is given to what
makes an error: a class of the ``KMergeError`` family or one in ``OTHERS``, a function in
``MAKERS``, or a list called ``problems``. The text may stand there, or reach it by a name or by
what a function returns or yields. What is put into a text when it runs is written ``...``; a text
that begins with a space or a punctuation mark is the tail of another, and one of several lines is
a prompt.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("kmerge_mlx/**/*.py"), *ROOT.glob("convert/*.py")])
OTHERS = {"BadParameter", "ApiError", "PatternError"}
"""Errors that are no ``KMergeError``: typer's, a server's answer, and one that becomes another."""
MAKERS = {"refused", "busy", "findings", "cls", "error", "_condemn", "_diverged", "_fail"}
"""Functions and names of classes (``error``, ``cls``) that messages are given to."""
_COLLECT = {"append", "extend", "add", "insert"}
_PROBLEMS = "problems"
_TAIL = " ,;:"
_VARIES = "..."
_WORD = re.compile(r"(?<![^\s(`])[a-zA-Z]{2,}(?![\w/=])")


@dataclass(frozen=True)
class Message:
    """A text with ``...`` for what varies, and where it stands."""

    text: str
    place: str


def _flat(node: ast.expr) -> str | None:
    """A text's constant words, ``...`` between them; None where the node is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(p.value if isinstance(p, ast.Constant) else _VARIES for p in node.values)
    return None


def _named(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def _owner(call: ast.Call) -> str | None:
    """The name of what a method is called on."""
    return getattr(getattr(call.func, "value", None), "id", None)


@cache
def _trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


@cache
def error_classes() -> frozenset[str]:
    """The names of the family's classes, however deep, and of the others."""
    found = {"KMergeError", *OTHERS}
    classes = [n for t in _trees().values() for n in ast.walk(t) if isinstance(n, ast.ClassDef)]
    while (
        more := {c.name for c in classes if {getattr(b, "id", "") for b in c.bases} & found} - found
    ):
        found |= more
    return frozenset(found)


@cache
def _functions() -> dict[str, list[tuple[Path, ast.FunctionDef]]]:
    """Every function of the package by its name."""
    found: dict[str, list[tuple[Path, ast.FunctionDef]]] = {}
    for path, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append((path, node))
    return found


def _given(scope: ast.AST, name: str) -> list[ast.expr]:
    """What a scope assigns to a name, or adds to it."""
    found = []
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            named = any(getattr(target, "id", None) == name for target in node.targets)
            found += [node.value] * named
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
            found += [node.value] * (getattr(node.target, "id", None) == name and bool(node.value))
        elif isinstance(node, (ast.For, ast.comprehension)):
            names = {getattr(inner, "id", None) for inner in ast.walk(node.target)}
            found += [node.iter] * (name in names)
        elif isinstance(node, ast.Call) and _named(node) in _COLLECT:
            found += node.args * (_owner(node) == name)
    return found


def _errors(scope: ast.AST) -> Iterator[ast.expr]:
    """What a scope gives to errors, and to lists of problems."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Call):
            listed = _owner(node) == _PROBLEMS and _named(node) in _COLLECT
            if listed or _named(node) in MAKERS | error_classes():
                yield from [*node.args, *(k.value for k in node.keywords)]
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
            if getattr(target, "id", None) == _PROBLEMS:
                yield node.value


def _follow(node: ast.AST, path: Path, scope: ast.AST, seen: set[int], found: set[Message]) -> None:
    """Keeps the texts in a node, and those that its names and calls stand for."""
    if id(node) in seen:
        return
    seen.add(id(node))
    text = _flat(node)
    if (
        text is not None
        and len(_WORD.findall(text)) > 1
        and "\n" not in text
        and text[0] not in _TAIL
    ):
        found.add(Message(text, f"{path.relative_to(ROOT)}:{node.lineno}"))
    if isinstance(node, ast.Name):
        tree = _trees()[path]
        for where in (scope, *(n for n in tree.body if not hasattr(n, "body"))):
            for value in _given(where, node.id):
                _follow(value, path, scope, seen, found)
    elif isinstance(node, ast.Call):
        homes = _functions().get(_named(node), [])
        local = [home for home in homes if home[0] == path]
        for home, function in local or homes * (len(homes) == 1):
            for inner in ast.walk(function):
                if isinstance(inner, (ast.Return, ast.Yield)) and inner.value is not None:
                    _follow(inner.value, home, function, seen, found)
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
            _follow(child, path, scope, seen, found)


@cache
def messages() -> frozenset[Message]:
    """All of them."""
    found: set[Message] = set()
    seen: set[int] = set()
    for path, tree in _trees().items():
        for scope in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            for value in _errors(scope):
                _follow(value, path, scope, seen, found)
    return frozenset(found)
