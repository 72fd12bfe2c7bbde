"""``kmerge-mlx chat``, as a pipe and on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import termios
import time

import pytest

from tests.cli_runner import CHATML, command, copy_base, environment, run
from tests.tiny import qwen2_config, write_base


@pytest.fixture(scope="module")
def named(tmp_path_factory, base_path, adapter_path):
    base = copy_base(base_path, tmp_path_factory.mktemp("talk") / "base", CHATML)
    return ("--model", base, "--adapter-path", adapter_path, "-m", 4)


def test_lines_are_questions_and_answers_go_to_stdout(named):
    done = run("chat", *named, stdin=b"One two three?\n/stats\nr\n/stats\nh\nFour?\nq\nnever\n")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) >= 2
    assert "questions: 1; last prompt: " in done.err
    assert "forgotten\nnothing was asked yet\nq exits" in done.err
    assert done.err.count("tokens-per-sec") == 2


@pytest.mark.slow
def test_a_fault_of_one_line_ends_nothing(named):
    """In a process of its own: a pipe may hold bytes that are not text."""
    done = subprocess.run(
        command("chat", *named),
        input=b"<raw>x\na\xff\nOne?\n",
        env=environment(),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert b"error: messages[0]: <raw> at line 1, column 1 is never closed" in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"not UTF-8") == done.stderr.count(b"tokens-per-sec") == 1


def test_files_are_the_context_of_the_first_question(named, tmp_path):
    path = tmp_path / "context.txt"
    path.write_text("One two three four five six seven eight. " * 20)
    done = run("chat", path, *named, stdin=b"What?\n/stats\nAnd?\n/stats\n")
    first, second = (line for line in done.err.splitlines() if line.startswith("questions"))
    assert "(3." in first
    assert int(second.split(" of them")[0].split()[-1]) > 30


class Terminal:
    """``kmerge-mlx chat`` on a terminal of its own."""

    def __init__(self, *args):
        self.seen, (self.master, slave) = "", pty.openpty()
        self.process = subprocess.Popen(
            command("chat", *args),
            **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
            env=environment(TERM="dumb"),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def until(self, found):
        """Reads on until a text was seen, or as many characters."""
        end = time.monotonic() + 60
        while len(self.seen) < found if isinstance(found, int) else found not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")

    def type(self, text):
        os.write(self.master, text.encode())


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    base = write_base(tmp_path / "base", qwen2_config())  # random, and does not end its text soon
    terminal = Terminal("--model", base, "-m", 1_000_000, "--max-kv-size", 64)
    try:
        terminal.until("> ")
        terminal.type("One two three?\r")
        terminal.until("three?\r\n")
        terminal.seen = ""
        terminal.until(20)  # it answers
        terminal.type("\x03")
        for text in ("(stopped)", "tokens-per-sec; read ", "> "):
            terminal.until(text)
        time.sleep(0.5)  # until it waits: what comes just before is seen with the next line alone
        terminal.type("\x03")
        terminal.until("q or Ctrl-D exits")
        terminal.type("q\r")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
