"""Whether the server takes requests now: not while its model is loaded, nor when it closes or has failed."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.generation.answering import Answers, Load
from megatron_sphinx.serving.openai_errors import RequestError


class Gate:
    """What stands between requests and the model; threads may use it without a lock.

    Args:
        answers: the model; None while it is loaded.
        most: requests that may be inside at a time.

    Attributes:
        is_closing: whether no more requests are taken, since the server is to end.
        failure: what ended the model; None while nothing has.
        inside: how many requests are inside.
    """

    def __init__(self, answers: Answers | None, most: int) -> None:
        self._answers, self._most = answers, most
        self.is_closing = False
        self.failure: SphinxError | None = None
        self.inside = 0

    def open(self, answers: Answers) -> None:
        """Let requests in to a model that has been loaded."""
        self._answers = answers

    def close(self) -> None:
        """Let no more requests in."""
        self.is_closing = True

    def fail(self, error: SphinxError) -> None:
        """Note what ended the model; the first error stands."""
        self.failure = self.failure or error

    def answers(self) -> Answers:
        """Return the model that answers.

        Raises:
            RequestError: it takes no requests now.
        """
        if self.failure is not None:
            raise RequestError(f"the model has failed: {self.failure}", status=503, code="model_failed")
        if self.is_closing:
            raise RequestError("the server is closing; ask another one", status=503, code="closing")
        if self._answers is None:
            raise RequestError("the model is being loaded; ask again later", status=503, code="loading")
        return self._answers

    @contextmanager
    def entered(self) -> Iterator[Answers]:
        """Count a request as inside, and give it the model.

        Raises:
            RequestError: no requests are taken now, or too many are inside.
        """
        answers = self.answers()
        if self.inside >= self._most:
            raise RequestError(
                f"{self.inside} requests are being answered or wait, as many as --requests allows; ask again later",
                status=503,
                code="queue_full",
            )
        self.inside += 1
        try:
            yield answers
        finally:
            self.inside -= 1

    def load(self) -> Load | None:
        """Return what the model is at; None where there is none, or where it has failed, which is noted."""
        if self._answers is None or self.failure is not None:
            return None
        try:
            return self._answers.load()
        except SphinxError as error:
            self.fail(error)
            return None
