"""The rules of CONTRIBUTING: who imports whom, who prints, how long things are, what CI runs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

from kmerge_mlx import _HOMES, __all__

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("kmerge_mlx/**/*.py"), *ROOT.glob("convert/*.py")])
TREES = {path: ast.parse(path.read_text()) for path in FILES}

# A folder (or a module beside the folders) imports from the rows above its own, and from itself.
LAYERS = [
    {"errors", "config", "bundled", "formats"},
    {"files", "prompts", "hub", "detokenizer"},
    {"settings"},
    {"adapters", "data"},
    {"base", "encoder"},
    {"virtual_tokens", "window_encoder", "multi_encoder", "source"},
    {"model", "convert"},
    {"generation"},
    {"train", "serving"},
    {"evaluation"},
    {"tools"},
    {"plots"},
    {"cli"},
    {"__main__"},
]


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = [part for part in relative.parts if part != "kmerge_mlx"]
    return ".".join(part for part in parts if part != "__init__") or "kmerge_mlx"


MODULES = {module_name(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kmerge_mlx":
            inner = node.module.removeprefix("kmerge_mlx").lstrip(".")
            for alias in node.names:
                name = f"{inner}.{alias.name}".lstrip(".")
                found.add(name if name in MODULES else inner)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.removeprefix("kmerge_mlx.") for n in names if n.startswith("kmerge_mlx.")}
    return found


def layer_of(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module.split(".")[0] in layer)


def test_imports_point_one_way():
    wrong = []
    for path in FILES:
        module = module_name(path)
        if module == "kmerge_mlx":
            continue  # the front door: every name is loaded on first use
        for other in imports(path) - {""}:
            same = other.split(".")[0] == module.split(".")[0]
            if not same and layer_of(other) >= layer_of(module):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def names_in(path: Path) -> tuple[set[str], set[str]]:
    """The names that a file uses, and the top packages that it imports."""
    nodes = list(ast.walk(TREES[path]))
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    modules = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    return names, {module.split(".")[0] for module in modules}


def test_only_the_cli_prints_or_imports_typer():
    for path in FILES:
        if not module_name(path).startswith("cli"):
            names, modules = names_in(path)
            assert "print" not in names, path
            assert "typer" not in modules, path


def test_the_runtime_never_imports_torch_or_peft_or_pickle():
    for path in FILES:
        assert not names_in(path)[1] & {"torch", "peft", "pickle", "datasets"}, path


def test_a_file_has_at_most_400_lines_and_a_function_at_most_60():
    for path, tree in TREES.items():
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_every_module_begins_with_one_plain_line():
    for path, tree in TREES.items():
        text = ast.get_docstring(tree) or ""
        assert text, path
        assert not text.startswith("Owns"), path


def test_a_public_method_has_a_docstring_unless_it_overrides_one_that_has():
    described, bare = set(), []
    of_libraries = ("on_", "connection_")  # callbacks of mlx-lm and asyncio
    for path, tree in TREES.items():
        for parent in ast.walk(tree):
            for node in parent.body if isinstance(parent, ast.ClassDef) else ():
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    if ast.get_docstring(node):
                        described.add(node.name)
                    else:
                        bare.append((node.name, f"{path}: {parent.name}.{node.name}"))
    assert [
        where for name, where in bare if name not in described and not name.startswith(of_libraries)
    ] == []


def test_every_public_name_is_there_and_importing_the_package_is_cheap():
    code = (
        "import sys, kmerge_mlx\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy'}\n"
        "assert not heavy & set(sys.modules)\n"
        "import kmerge_mlx.cli\n"
        "assert not heavy & set(sys.modules)\n"
        "import kmerge_mlx.generation.stream\n"
        "assert all(callable(getattr(kmerge_mlx, n)) for n in kmerge_mlx._HOMES)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert set(__all__) == {*_HOMES, "__version__"}


def test_ci_runs_exactly_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    (command,) = {line for line in readme.splitlines() if line.endswith("&& .venv/bin/pytest")}
    assert command.startswith("python3 -m venv .venv && ")
    assert command in (ROOT / ".ci" / "run").read_text()


def test_the_runtime_needs_no_more_than_it_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {spec.split(">")[0].split("[")[0] for spec in project["dependencies"]}
    assert names == {
        *("mlx", "mlx-lm", "numpy", "transformers", "huggingface_hub", "typer", "rapidfuzz"),
        *("fastapi", "uvicorn", "prometheus_client"),
        # Imported here, and in every install anyhow: mlx-lm and the hub client bring them.
        *("safetensors", "pyyaml", "tqdm"),
    }
    known = {name.replace("-", "_").replace("pyyaml", "yaml") for name in names}
    known |= {"kmerge_mlx", *sys.stdlib_module_names}
    known |= {"matplotlib", "llguidance"}  # of the extras `plot` and `structured`
    used = set().union(*(names_in(path)[1] for path in FILES))
    # FastAPI, mlx-lm, transformers and uvicorn bring these.
    assert used - known <= {"starlette", "pydantic", "pydantic_core", "jinja2", "tokenizers", "h11"}
    assert "torch==2.13.0" in project["optional-dependencies"]["parity"]
