"""The engine in a thread of its own, which many threads hand requests in to."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from threading import Condition, Thread, current_thread
from typing import TypeVar, cast

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.generation.answering import Listener, Load, QueueFullError
from megatron_sphinx.generation.engine import Engine, Language
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.requests import Finish, Prompt, Sampling
from megatron_sphinx.generation.sequence import CachedSequence
from megatron_sphinx.generation.ticks import Executor

T = TypeVar("T")
_PICTURE_SECONDS = 0.002  # how often a picture that is all there is to wait for is asked after


class ClosedError(SphinxError):
    """The service takes no requests any more."""


class BusyError(SphinxError):
    """What was ordered cannot be done while requests are under way."""


class RequestTicket:
    """A request that was handed in."""

    def __init__(self, service: "Service", sequence: CachedSequence) -> None:
        self._service, self._sequence = service, sequence

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt were in the prefix cache, once its first chunk has come."""
        return self._sequence.cached_tokens or 0

    def cancel(self) -> None:
        """End the request; its listener hears a last chunk, unless it has heard one."""
        self._service.cancel(self._sequence)


class Service:
    """An engine in a thread of its own, which sleeps while there is nothing to do.

    All methods may be called by any thread at any time; listeners are called in the engine's thread, and keep it from
    computing for as long as they take.

    Args:
        executor: computes the ticks, in the engine's thread.
        language: of the answers.
        limits: of what is taken on at once.

    Attributes:
        is_closing: whether it takes no requests any more.
    """

    def __init__(self, executor: Executor, language: Language, limits: Limits) -> None:
        self._engine, self._most_waiting = Engine(executor, language, limits), limits.waiting
        self._changed = Condition()
        self._todo: deque[Callable[[], None]] = deque()
        self._handed_in = 0  # requests among these
        self._load = self._engine.load()
        self._error: SphinxError | None = None
        self.is_closing = False
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def error(self) -> SphinxError | None:
        """Why no request can be answered any more; None where they can."""
        return self._error

    def submit(self, prompt: Prompt, sampling: Sampling, listen: Listener) -> RequestTicket:
        """Hand in a request for an answer; the arguments are those of Answers.submit.

        Raises:
            DataError: prompt and answer do not fit.
            ConfigError: a number of `sampling` is out of its range.
            QueueFullError: too many requests are waiting.
            ClosedError: the service is closed.
        """
        return self._hand_in(self._engine.answer(prompt, sampling, listen))

    def score(
        self, prompt: Prompt, continuation: tuple[int, ...], listen: Listener, choices: tuple[int, ...] = ()
    ) -> RequestTicket:
        """Hand in a request for the log-probabilities of a continuation; the arguments are those of Engine.score.

        Raises:
            DataError: there is nothing to score, or it does not fit.
            QueueFullError: too many requests are waiting.
            ClosedError: the service is closed.
        """
        return self._hand_in(self._engine.score(prompt, continuation, listen, choices))

    def _hand_in(self, sequence: CachedSequence) -> RequestTicket:
        """Give a request to the engine."""
        with self._changed:
            if self._error is not None:
                raise self._error
            if self.is_closing:
                raise ClosedError("the model is being closed: it takes no request any more; load it again")
            if self._engine.waiting + self._handed_in >= self._most_waiting:
                raise QueueFullError(
                    f"waiting={self._most_waiting}: as many requests as may are waiting already; ask again later"
                )
            self._handed_in += 1
            self._tell(lambda: self._add(sequence))
        return RequestTicket(self, sequence)

    def _add(self, sequence: CachedSequence) -> None:
        """Let the engine begin with a request."""
        with self._changed:
            self._engine.add(sequence)
            self._handed_in -= 1

    def cancel(self, sequence: CachedSequence) -> None:
        """End a request that was handed in before."""
        with self._changed:
            self._tell(lambda: self._engine.cancel(sequence))

    def _tell(self, what: Callable[[], None]) -> None:
        """Have something done in the engine's thread; the lock is held."""
        self._todo.append(what)
        self._changed.notify_all()

    def call(self, work: Callable[[], T]) -> T:
        """Do something in the engine's thread while no request is under way, and return what it gives.

        What prompts have in common with earlier ones is computed anew behind it.

        Raises:
            BusyError: a request is under way.
            ClosedError: the service is closed.
            SphinxError: the model has ended.
        """
        done: SimpleQueue[tuple[T | None, SphinxError | None]] = SimpleQueue()

        def do() -> None:
            if self._error is not None:
                done.put((None, self._error))
                return
            if not self._engine.is_idle:
                done.put((None, BusyError("requests are under way: wait until they are answered, and order it then")))
                return
            try:
                self._engine.forget_prefixes()
                done.put((work(), None))
            except SphinxError as error:
                done.put((None, error))
                raise

        with self._changed:
            if self._error is not None:
                raise self._error
            if self.is_closing:
                raise ClosedError("the model is being closed: it obeys no order any more; load it again")
            self._tell(do)
        result, error = done.get()
        if error is not None:
            raise error
        return cast(T, result)

    def load(self) -> Load:
        """Return what the engine is at, or was before the tick that it computes now."""
        with self._changed:
            return replace(self._load, waiting=self._engine.waiting + self._handed_in)

    def close(self, *, finish: bool = True) -> None:
        """Take no requests any more, and return once the thread has ended.

        Args:
            finish: whether requests that were handed in are answered first; they are cancelled otherwise.
        """
        with self._changed:
            self.is_closing = True
            if not finish:
                self._tell(lambda: self._engine.end_all(Finish.CANCELLED))
            self._changed.notify_all()
        if current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        """Compute ticks until the service is closed or the executor fails."""
        is_busy = True
        try:
            while self._wait(is_busy=is_busy):
                with self._engine.failing_together():
                    self._do_what_was_told()
                is_busy = self._engine.step()
                with self._changed:
                    self._load = self._engine.load()
        except SphinxError as error:
            with self._changed:
                self._error = error
            self._do_what_was_told()
            self._engine.end_all(error)
            with self._changed:
                self._load = self._engine.load()

    def _wait(self, *, is_busy: bool) -> bool:
        """Sleep while there is nothing to do; False where there will be no more.

        Args:
            is_busy: whether the last step computed something; else it waits for a picture.
        """
        with self._changed:
            while not self._todo and self._engine.is_idle:
                if self.is_closing:
                    return False
                self._changed.wait()
            if not self._todo and not is_busy:
                self._changed.wait(_PICTURE_SECONDS)
        return True

    def _do_what_was_told(self) -> None:
        """Do what other threads want done; the lock is not held, since listeners are called."""
        with self._changed:
            todo, self._todo = self._todo, deque()
        for what in todo:
            what()
