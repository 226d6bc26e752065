"""What a request is refused with: an HTTP status and an error in OpenAI's form."""

from typing import Any

from megatron_sphinx.errors import ConfigError, DataError, SphinxError
from megatron_sphinx.generation.answering import QueueFullError, TooLongError

RETRY_SECONDS = 1  # after which a client that was told to come again may do so
CLIENT_GONE = 499  # nobody gets this status; it stands in the log and in the metrics


class RequestError(SphinxError):
    """A request that gets no answer.

    Attributes:
        status: of HTTP.
        code: OpenAI's short word for the reason, or one of ours.
        parameter: the part of the request that is wrong, e.g. `messages[0].role`; None where it is none.
        headers: of the response.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str = "invalid_value", parameter: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.parameter = status, code, parameter
        self.headers: dict[str, str] = {}
        if status == 503:
            self.headers["Retry-After"] = str(RETRY_SECONDS)
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's form; half characters are written by their numbers."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message, parameter = (
            text and text.encode(errors="backslashreplace").decode() for text in (str(self), self.parameter)
        )
        return {"error": {"message": message, "type": kind, "param": parameter, "code": self.code}}


def as_request_error(error: SphinxError) -> RequestError:
    """Say what a client is told of an error that ended its request.

    Args:
        error: of reading the request, or of the model.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, TooLongError):
        return RequestError(str(error), code="context_length_exceeded", parameter="messages")
    if isinstance(error, DataError | ConfigError):
        return RequestError(str(error), parameter="messages")
    if isinstance(error, QueueFullError):
        return RequestError(str(error), status=503, code="queue_full")
    return RequestError(f"the model has failed: {error}", status=500, code="model_failed")
