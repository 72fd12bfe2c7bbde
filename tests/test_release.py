"""What a release uploads: built, checked, and installed where nothing else is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kmerge_mlx import __version__, bundled
from tests.cli_runner import environment

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
JUNK = shutil.ignore_patterns("*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
PARTS = (".ci", "benchmarks", "convert", "docs", "examples", "kmerge_mlx", "tests")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The sdist of the working tree, and the wheel that is built from that sdist alone."""
    root = tmp_path_factory.mktemp("release")
    source, out = root / "source", root / "dist"
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=JUNK)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, source)
    _call(sys.executable, "-m", "build", "--outdir", out, source, cwd=root)
    return out


def test_twine_finds_nothing_wrong(dist):
    done = _call(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    assert done.count("PASSED") == 2, done


def test_the_version_is_the_same_everywhere(dist):
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", __version__)
    named = {f"kmerge_mlx-{__version__}.tar.gz", f"kmerge_mlx-{__version__}-py3-none-any.whl"}
    assert {file.name for file in dist.iterdir()} == named
    newest = re.search(r"^## (\S+) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert newest == cited == __version__


def test_the_sdist_holds_the_project(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {
        str(file.relative_to(ROOT))
        for part in PARTS
        for file in (ROOT / part).rglob("*")
        if file.is_file() and not _is_junk(file)
    }
    assert wanted - held == set()
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md"} <= held


def test_the_wheel_holds_the_package_and_the_bundled_model_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = [f for f in (ROOT / "kmerge_mlx").rglob("*") if f.is_file() and not _is_junk(f)]
    wanted = {str(file.relative_to(ROOT)) for file in package}
    wanted |= {f"kmerge_mlx/{f.relative_to(ROOT)}" for f in (ROOT / "convert").glob("*.py")}
    assert held == wanted
    assert f"kmerge_mlx/bundled/{bundled.BASE.name}/config.json" in held


def test_the_wheel_alone_answers_from_an_empty_folder(dist, tmp_path):
    """Beside the libraries of this environment: ``test_house.py`` knows which it may need."""
    _call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    tools = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", tools / "python", "install", "--quiet")
    _call(*pip, "--no-deps", "--disable-pip-version-check", next(dist.glob("*.whl")))
    (place,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (place / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    work = tmp_path / "empty"
    work.mkdir()
    tree = ROOT / "examples" / "tree.txt"
    assert _call(tools / "kmerge-mlx", "generate", "--k", "4", tree, cwd=work) == "true\n"
    assert _call(tools / "kmerge-mlx", "--version", cwd=work) == f"kmerge-mlx {__version__}\n"


def _call(*line: object, cwd: Path | None = None) -> str:
    """What a command writes to stdout; it must succeed."""
    done = subprocess.run(
        [*map(str, line)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _is_junk(file: Path) -> bool:
    return "__pycache__" in file.parts or file.suffix == ".pyc" or "egg-info" in str(file)
