"""Every script in examples/serving runs against the bundled model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kmerge_mlx import bundled
from tests.cli_runner import copy_base, environment
from tests.servers import serving

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"
BUNDLED = Path(bundled.__file__).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("sesame")
    with serving("bundled", "bundled", 4, api_key=str(key)) as address:
        yield address


def run(server, program: str, script: str, *arguments: str) -> list[str]:
    changes = {"BASE_URL": server.url, "API_KEY": "sesame", "PATH": os.environ["PATH"]}
    line = [program, str(EXAMPLES / script), *arguments]
    options = {"env": environment(**changes), "capture_output": True, "text": True}
    done = subprocess.run(line, **options, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def positions(line: str) -> tuple[int, int]:
    tokens, compressed = re.search(r"(\d+) tokens in (\d+) positions", line).groups()
    return int(tokens), int(compressed)


@pytest.mark.parametrize("name", ["openai_client.py", "langchain_client.py"])
def test_the_clients_that_are_installed_here_pass_every_check(name, tmp_path):
    clients = EXAMPLES / "clients"
    base = copy_base(BUNDLED / "base", tmp_path / "bundled")
    shutil.copy(clients / "chat_template.jinja", base)
    with serving(base, "bundled", 4, chat_template=True) as address:
        lines = run(address, sys.executable, f"clients/{name}")
    assert len(lines) == (clients / name).read_text().count("\ncheck(")
    assert [line for line in lines if not line.startswith("ok\t")] == []


def test_every_example_is_tested():
    tested = {"openai_client.py", "langchain_client.py", "curl.sh", "rag.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested


def test_the_openai_example(server):
    _, counts, *_, cached = run(server, sys.executable, "openai_client.py")
    tokens, compressed = positions(counts)
    assert compressed == -(-tokens // 4)
    assert int(cached.split()[0]) > tokens // 2


def test_the_langchain_example(server):
    answer, counts, streamed = run(server, sys.executable, "langchain_client.py")
    assert answer == streamed
    tokens, compressed = positions(counts)
    assert compressed == -(-tokens // 4)


def test_the_curl_example(server):
    models, answer, *stream = run(server, "bash", "curl.sh")
    assert '"bundled"' in models
    assert '"compressed_tokens"' in answer
    assert "data: [DONE]" in stream
    assert stream[-1].startswith("kmerge_mlx_compressed_tokens_total ")


def test_the_rag_example_merges_documents_and_not_the_question(server):
    _, first, _, second = run(server, sys.executable, "rag.py", "Is WX a child of UV?")
    tokens, compressed = positions(first)
    assert tokens / 4 < compressed < tokens * 0.6
    assert int(re.search(r"(\d+) tokens cached", second)[1]) > tokens * 0.6
