"""A chat request under way: from the threads of the model to the event loop of the server, until the client is gone."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

from starlette.types import Receive

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.generation.answering import Answers, Listener, Ticket
from megatron_sphinx.generation.requests import Chunk, Finish, Generation, Prompt, Sampling
from megatron_sphinx.serving.openai_errors import RequestError
from megatron_sphinx.serving.openai_responses import Tally

_Heard = Chunk | SphinxError


class Exchange:
    """The answers to one request, as they come.

    Args:
        answers: the model.
        prompt: what to answer.
        sampling: how the first answer is drawn; the next ones take the seeds behind its own.
        count: of answers.

    Attributes:
        has_client: whether the client is there, as far as is known.
        first_token: when the first token came, in seconds of `time.monotonic`; None before.
    """

    def __init__(self, answers: Answers, prompt: Prompt, sampling: Sampling, count: int) -> None:
        self._answers, self._prompt, self._sampling, self._count = answers, prompt, sampling, count
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[int, _Heard]] = asyncio.Queue()
        self._tickets: dict[int, Ticket] = {}
        self._new, self._cached = 0, 0
        self.has_client = True
        self.first_token: float | None = None

    def submit(self) -> None:
        """Hand all answers in.

        Raises:
            SphinxError: the model does not take them; then none is handed in.
        """
        try:
            for index in range(self._count):
                sampling = replace(self._sampling, seed=(self._sampling.seed + index) % 2**63)
                self._tickets[index] = self._answers.submit(self._prompt, sampling, self._listener(index))
        except SphinxError:
            self.cancel()
            raise

    def _listener(self, index: int) -> Listener:
        return partial(self._hear, index)

    def _hear(self, index: int, heard: _Heard) -> None:
        """Take what the model says, in one of its threads; without an event loop nobody needs it any more."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._heard.put_nowait, (index, heard))

    def cancel(self) -> None:
        """End the answers that have not ended; what they hold is free soon."""
        for ticket in self._tickets.values():
            ticket.cancel()

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Yield the parts of all answers, each with the number of its answer, until all have ended.

        Raises:
            SphinxError: the model has failed, or has ended an answer that the client still waits for.
        """
        while self._tickets:
            index, heard = await self._heard.get()
            if isinstance(heard, SphinxError):
                del self._tickets[index]
                raise heard
            self._new += len(heard.tokens)
            self._cached = max(self._cached, self._tickets[index].cached_tokens)
            if heard.tokens and self.first_token is None:
                self.first_token = time.monotonic()
            if heard.finish is not None:
                del self._tickets[index]
            if heard.finish is Finish.CANCELLED and self.has_client:
                raise RequestError("the answer was ended, for the server is closing", status=503, code="closing")
            yield index, heard

    async def whole(self) -> list[Generation]:
        """Wait for all answers.

        Raises:
            SphinxError: as `chunks` does.
        """
        parts: list[list[Chunk]] = [[] for _ in range(self._count)]
        async for index, chunk in self.chunks():
            parts[index].append(chunk)
        return [Generation.of(chunks, len(self._prompt.tokens)) for chunks in parts]

    def tally(self) -> Tally:
        """Return how many tokens this took so far."""
        return Tally(len(self._prompt.tokens), self._cached, self._new)

    @asynccontextmanager
    async def watching(self, receive: Receive) -> AsyncIterator[None]:
        """End the answers as soon as the client is gone, and in the end those that have not ended.

        Args:
            receive: what the server hears of the client, whose request has been read to its end.
        """
        watcher = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watcher.cancel()
            self.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.has_client = False
        self.cancel()
