"""What goes wrong, as OpenAI's API says it: a status, and a JSON object with one error.

Owns: the error form, and which of this project's exceptions means which status. Does not know
sockets or models.

Source: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from typing import Any

from kmerge_mlx.errors import BlockTableFullError, KMergeError

RETRY_SECONDS = 1
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: For a person.
        param: The field of the request that is to blame, or None.
        code: A short name for a program, or None.
        headers: Further HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, other)
        named = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": named}


class ClientGone(Exception):
    """Nobody reads the answer any more."""


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The answer to a request that cannot be right."""
    return ApiError(400, message, param=param, code=code)


def busy(status: int, message: str, code: str) -> ApiError:
    """The answer to a request that may be right later."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(RETRY_SECONDS)})


def as_api_error(error: Exception) -> ApiError:
    """Any exception as an answer; what nobody foresaw is a 500 that says nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BlockTableFullError):
        message = "the prompts have more blocks at once than the server has slots: try again"
        return busy(503, message, "blocks_exhausted")
    if isinstance(error, KMergeError):
        return refused(str(error))
    return ApiError(500, "the server failed to answer: its log says why", code="internal_error")
