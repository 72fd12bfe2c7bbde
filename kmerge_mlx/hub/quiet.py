"""The hub client's own output, where it would stand in the way.

Owns what of it is held back: its word on its retries, which end well or in this project's error,
and its progress bars where nobody watches them. The library's own modules print nothing.

Source: https://huggingface.co/docs/huggingface_hub/package_reference/utilities (``logging``,
progress bars), and /environment_variables (``HF_HUB_VERBOSITY``, ``HF_HUB_DISABLE_PROGRESS_BARS``).
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

# What the client says of a failure it tries to mend, and of one that this project's line is about.
_CHATTER = re.compile(
    "thrown while requesting|^Retrying in |^Error while downloading|^Ignored error while writing"
    "|^No files matched"
)
_DELAY = 1.0  # seconds; what is in the cache takes less, and needs no bar


@contextmanager
def quietly() -> Iterator[None]:
    """Holds back what the hub client says of its retries, and its bars where there is no terminal.

    ``HF_HUB_VERBOSITY`` and ``HF_HUB_DISABLE_PROGRESS_BARS``, the client's own settings, have the
    last word. That it waits for a rate limit is said in any case: it may take minutes.
    """
    with ExitStack() as stack:
        if not os.environ.get("HF_HUB_VERBOSITY"):
            stack.enter_context(_without_retries())
        if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ and not _watched():
            stack.enter_context(_without_bars())
        yield


def late_bar() -> type[Any]:
    """The client's progress bar, shown only of what takes its time."""
    from huggingface_hub.utils import tqdm

    class Late(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{"delay": _DELAY} | options)

    return Late


@contextmanager
def _without_retries() -> Iterator[None]:
    from huggingface_hub.utils import logging as of_the_hub

    handlers = of_the_hub.get_logger().handlers

    said: dict[str, logging.LogRecord] = {}

    def hears(record: logging.LogRecord) -> bool:
        # Files that wait for a rate limit do so side by side, and say the same.
        text = record.getMessage()
        if said.setdefault(text, record) is not record:
            return False
        return _CHATTER.search(text) is None

    for handler in handlers:
        handler.addFilter(hears)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Not enough free disk space")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(hears)


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub import utils

    before = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            utils.enable_progress_bars()


def _watched() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
