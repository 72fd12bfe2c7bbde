"""Commands that talk to the hub on the loopback: in processes of their own, or in this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants

from tests.cli_runner import Result
from tests.hub_server import Hub

# Nothing here may wait for the real hub: no proxies, no telemetry, no second transport.
QUIET = {
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "NO_PROXY": "*",
}


def settings(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that uses a hub, with a cache and a login of its own."""
    return QUIET | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}


@contextmanager
def using(hub: Hub, home: Path, token: str | None = None, **more: Any) -> Iterator[None]:
    """Lets this process use a hub: what the client reads from its environment when imported.

    ``home`` holds its cache; another one is another machine. ``more``: constants of the client.
    """
    ours = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ours | more).items():
            patch.setattr(constants, name, value)
        patch.setenv("NO_PROXY", "*")
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        close_session()
        yield
    close_session()


def assert_said(result: Result, line: str) -> None:
    """Checks that a command failed with exactly this line."""
    assert (result.code, result.out, result.err) == (1, "", f"error: {line}\n")
