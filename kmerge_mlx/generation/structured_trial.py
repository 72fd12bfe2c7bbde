"""Compiles a grammar in a process of its own, where a hostile one can do no harm.

``structured.py`` runs it as a script with a limit in seconds: the grammar comes on stdin, what is
wrong with it goes to stdout.
"""

import resource
import sys
import threading
from contextlib import suppress

STACK = 1 << 20
"""Bytes of stack that it may take: less than any thread of the process that asks has."""

MEMORY = 1 << 30
"""Bytes of memory that it may take, where the system has such a limit (macOS has none)."""


def compile_grammar() -> None:
    """Compiles the grammar on stdin for a tokenizer that has a token for each byte."""
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0)
    matcher.compute_bitmask()  # only here a schema that is nothing but itself is found out
    sys.stdout.write(matcher.get_error())


if __name__ == "__main__":
    seconds = int(sys.argv[1])
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_AS: MEMORY, resource.RLIMIT_CPU: seconds}
    for limit, most in limits.items():
        with suppress(ValueError, OSError):
            resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))
    threading.stack_size(STACK)
    thread = threading.Thread(target=compile_grammar)
    thread.start()
    thread.join()
