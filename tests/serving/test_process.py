"""``kmerge-mlx serve`` as a process: how it starts, what it says, and how it ends."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.cli_runner import (
    assert_one_error,
    change_json,
    command,
    environment,
    run,
    run_process,
)
from tests.servers import PATIENCE, Address, eventually, long_answer, rest_of, serving_process

pytestmark = pytest.mark.slow


@pytest.fixture
def model(base_path, adapter_path):
    return ("--model", base_path, "--adapter-path", adapter_path)


def test_sigterm_lets_requests_in_flight_end_and_refuses_new_ones(model):
    with serving_process(*model) as server, ThreadPoolExecutor(2) as pool:
        address = server.address
        assert server.said == [
            f"To ask it in a browser: http://127.0.0.1:{address.port}",
            f"Serving base (K=4, merges all) at http://127.0.0.1:{address.port}/v1",
        ]
        asked = [pool.submit(address.complete, **long_answer(max_tokens=800)) for _ in range(2)]
        eventually(lambda: address.metric("requests_in_flight") == 2)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: address.request("GET", "/health").status == 503)
        assert address.request("GET", "/health").json == {"status": "draining"}
        refused = address.complete(prompt="x")
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        assert [future.result(PATIENCE).status for future in asked] == [200] * 2
        assert server.wait() == 0
    assert server.said[2:] == ["Ending: requests in flight end first (again: at once)"]


@pytest.mark.parametrize("drain", [0.2, 500])
def test_what_does_not_end_in_time_or_by_a_second_signal_is_given_up(model, drain):
    with (
        serving_process(*model, "--drain-timeout", drain) as server,
        server.address.open_stream(**long_answer()) as stream,
    ):
        server.process.send_signal(signal.SIGINT)
        if drain == 500:
            eventually(lambda: server.address.request("GET", "/health").status == 503)
            server.process.send_signal(signal.SIGINT)
        assert server.wait() == 1
        assert server.said[-1] == "error: 1 requests did not end in time and were given up"
        assert b'"shutting_down"' in rest_of(stream)


def test_a_server_that_cannot_start_is_one_message():
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for arguments, said in (
        (("--port", port), f"cannot listen on 127.0.0.1:{port}: Address already in use"),
        (("--model", "/no/such"), "/no/such is neither a folder"),
        (("--api-key", "/no/such"), "cannot read --api-key /no/such"),
        (("--chat-template-args", '{"x": 1}'), "--chat-template-args needs a chat template"),
        (("--top-k", 99_999), " tokens: give fewer"),
        (("--kv-bits", 4, "--kv-group-size", 128), "--kv-bits and --kv-group-size: "),
    ):
        assert_one_error(run("serve", "--port", 0, *arguments), 1, said)
    taken.close()
    wrong = {"--port": 70_000, "--chat-template-args": "{", "--kv-bits": 7, "--log-level": "LOUD"}
    for name, value in (wrong | {"--prompt-cache-bytes": "much"}).items():
        assert_one_error(run("serve", name, value), 2, name)


def test_a_server_that_refuses_its_model_ends_with_1():
    for _ in range(3):  # an abort more often than not, where MLX still had a stream of the thread
        done = run_process("serve", "--port", 0, "--top-k", 99_999)
        assert done.code == 1, done.err
        assert done.err.endswith("has 277 tokens: give fewer\n")


def test_it_warns_when_anybody_may_ask_and_notes_another_layout_than_in_training(
    base_path, adapter_path, tmp_path
):
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_path, adapter)
    layout = {"merges": "contexts", "threshold": 32, "chat_template": False}
    change_json(adapter / "merge_config.json", layout=layout)
    arguments = ("--model", base_path, "--adapter-path", adapter, "--merges", "all")
    with serving_process(*arguments, "--host", "0.0.0.0") as server:
        note, warning, _, started = server.said
        assert note == "note: this adapter was trained with --merges contexts"
        assert warning.startswith("warning: 0.0.0.0 can be reached")
        assert "merges all" in started
        assert server.address.complete(prompt="x").status == 200


def test_the_bundled_model_is_served_without_an_argument_and_with_a_key_without_a_warning():
    with serving_process("--host", "0.0.0.0", KMERGE_MLX_API_KEY="sesame") as server:
        note, _, line = server.said
        assert note.startswith("note: no --model and no --adapter-path: the bundled model reads")
        assert line.startswith("Serving bundled (K=4, merges ")
        assert server.address.request("GET", "/v1/models").status == 401
        headers = {"Authorization": "Bearer sesame"}
        models = server.address.request("GET", "/v1/models", headers=headers)
        assert models.json["data"][0]["id"] == "bundled"
        server.process.terminate()
        assert server.wait() == 0


@contextmanager
def patched(patch: str, until: str) -> Iterator[subprocess.Popen]:
    """``kmerge-mlx serve`` of the bundled model with other code, once stderr says ``until``."""
    code = f"import sys, time\n{patch}\nfrom kmerge_mlx.cli import main\nmain()"
    line = [sys.executable, "-c", code, "serve", "--port", "0", "--log-level", "ERROR"]
    process = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        while until not in (said := process.stderr.readline()):
            assert said
        process.address = Address(int((re.search(r":(\d+)/v1$", said) or [0, 0])[1]))
        yield process
    finally:
        process.kill()
        process.communicate()


LOADING = """
import kmerge_mlx.serving.generator as generator
def load(*args, **options):
    print("loading", file=sys.stderr, flush=True)
    time.sleep(600)
generator.load_source = load
"""
DOWNLOADING = """
import kmerge_mlx.serving.service as service
def find(*args):
    print("loading", file=sys.stderr, flush=True)
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor() as pool:
        pool.submit(time.sleep, 600).result()
service.Source.find = find
"""


@pytest.mark.parametrize("work", [LOADING, DOWNLOADING])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_that_is_still_loading(work, number):
    with patched(work, "loading") as process:
        process.send_signal(number)
        assert process.wait(20) == -number


def test_a_server_whose_model_has_stopped_exits():
    patch = """
import kmerge_mlx.serving.generator as generator
def fail(self):
    while not self.jobs:
        time.sleep(0.01)
    raise RuntimeError("a bug")
generator.CompressingGenerator._generate = fail
"""
    with patched(patch, "Serving ") as process:
        for _ in range(3):
            with suppress(OSError, HTTPException):
                process.address.complete(prompt="x", max_tokens=1)
        assert process.wait(PATIENCE) == 1
        assert process.stderr.read().endswith("error: the model has stopped: its log says why\n")


@pytest.mark.parametrize("stderr", ["/dev/full", "no reader"])
def test_it_serves_and_drains_where_its_log_cannot_be_written(model, stderr):
    if stderr.startswith("/") and not Path(stderr).exists():
        pytest.skip("no /dev/full here")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if stderr == "no reader":
        reader, log = os.pipe()
        os.close(reader)
    else:
        log = os.open(stderr, os.O_WRONLY)
    line = command("serve", "--port", port, *model)
    process = subprocess.Popen(line, env=environment(), stderr=log)
    os.close(log)
    address = Address(port)
    try:
        eventually(lambda: health_of(address) == 200)
        for _ in range(20):
            assert address.complete(prompt="").status == 400  # a line in the log
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(address.complete, **long_answer(max_tokens=800))
            eventually(lambda: address.metric("requests_in_flight") == 1)
            process.send_signal(signal.SIGTERM)
            assert asked.result(PATIENCE).status == 200
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def health_of(address: Address) -> int | None:
    with suppress(OSError):
        return address.request("GET", "/health").status


def test_a_prompt_that_is_prepared_without_end_does_not_keep_the_server_from_ending():
    patch = """
import kmerge_mlx.serving.prepare as prepare
def lay_out_text(*args):
    while True:
        pass
prepare.lay_out_text = lay_out_text
import sys; sys.argv += ["--request-timeout", "1"]
"""
    with patched(patch, "Serving ") as process:
        assert process.address.complete(prompt="x").status == 504
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_connections_may_be_more_than_the_soft_limit_of_open_files(model):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))  # the child's, which raises it
    try:
        server = serving_process(*model)
        address = server.__enter__().address
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with ExitStack() as open_ones:
        open_ones.push(server)
        for _ in range(200):
            connection = open_ones.enter_context(address.connect())
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
