"""The engine: requests come in, ticks go to the executor, answers come out, a token of each at a time."""

from collections import Counter, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_sphinx.errors import DataError, SphinxError, shortened
from megatron_sphinx.generation.answering import Listener, Load, TooLongError
from megatron_sphinx.generation.delivery import AnswerDelivery, Delivery, ScoreDelivery, TextFeeds
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.replica import Replica
from megatron_sphinx.generation.requests import Finish, Prompt, Sampling
from megatron_sphinx.generation.sequence import CachedSequence
from megatron_sphinx.generation.ticks import Executor, Outcome, Piece, Tick
from megatron_sphinx.ranges import check_ranges

_LOAD_SHARE = 4  # tokens that others have still to compute count as much as one of the request's own

Planned = list[tuple[CachedSequence, Piece]]


@dataclass(frozen=True)
class Language:
    """What the engine must know of the language that answers are in.

    Attributes:
        ends: ids that end an answer, EOS above all.
        texts: makes what turns an answer's tokens into text.
    """

    ends: Collection[int]
    texts: TextFeeds


class EngineError(SphinxError):
    """The executor failed, and no request can be answered any more."""

    exit_status = 1


class Engine:
    """Continuous batching: a tick computes the next token of each answer, and as much of prompts as it has room for.

    Equal requests in equal order give equal ticks. No method but `answer` and `score` may be called by two threads at
    once.

    Args:
        executor: computes the ticks.
        language: of the answers.
        limits: of what is taken on at once.
    """

    def __init__(self, executor: Executor, language: Language, limits: Limits) -> None:
        self._executor, self._language, self._has_prefix_cache = executor, language, limits.has_prefix_cache
        self._counts = Counter[str]()
        self._replicas = [Replica(executor, limits, self._counts) for _ in range(executor.replicas)]
        self._under_way: deque[list[Planned]] = deque()
        self._numbers = 0

    def answer(self, prompt: Prompt, sampling: Sampling, listen: Listener) -> CachedSequence:
        """Make a request for an answer ready to be added; the arguments are those of Answers.submit.

        Raises:
            ConfigError: a number of `sampling` is out of its range.
            TooLongError: prompt and answer do not fit.
        """
        check_ranges(sampling, "sampling.")
        delivery = AnswerDelivery(listen, sampling, self._language.ends, self._language.texts(sampling.stop))
        return self._fitting(prompt, delivery, sampling.max_new_tokens, sampling=sampling)

    def score(
        self, prompt: Prompt, continuation: tuple[int, ...], listen: Listener, choices: tuple[int, ...] = ()
    ) -> CachedSequence:
        """Make a request for the log-probabilities of a continuation ready to be added.

        Args:
            prompt: what it follows.
            continuation: ids of its tokens; empty where there are choices alone.
            listen: hears one chunk, with the log-probability of each token and then of each choice, or an error.
            choices: ids of tokens of which each may come next behind the continuation.

        Raises:
            DataError: there is nothing to score.
            TooLongError: it does not fit.
        """
        if not continuation and not choices:
            raise DataError("continuation='': there is nothing to score; give a text of one token or more")
        delivery, new = ScoreDelivery(listen, (*continuation, *choices)), len(continuation) + bool(choices)
        return self._fitting(prompt, delivery, new, continuation=continuation, choices=choices)

    def _fitting(
        self,
        prompt: Prompt,
        delivery: Delivery,
        new: int,
        sampling: Sampling | None = None,
        continuation: tuple[int, ...] = (),
        choices: tuple[int, ...] = (),
    ) -> CachedSequence:
        """Make the sequence of a request, if model and cache are long enough for it."""
        length, executor = len(prompt.tokens), self._executor
        if not length:
            raise DataError("prompt='': has no tokens; begin it with BOS")
        for name, most in (("model", executor.positions), ("cache", executor.places)):
            if length + new > most:
                raise TooLongError(
                    f"prompt of {length} tokens with {new} new ones: the {name} has room for {most} together; "
                    f"shorten it, or ask for at most {most - length} new ones"
                    if length < most
                    else f"prompt of {length} tokens: the {name} has room for {most} with its answer; shorten it"
                )
        return CachedSequence(
            prompt,
            delivery,
            block=executor.block,
            sampling=sampling,
            continuation=continuation,
            choices=choices,
            is_shared=self._has_prefix_cache and prompt.mark is None,  # what is recorded must be computed
        )

    def add(self, sequence: CachedSequence) -> None:
        """Take a request in, at the replica where it will have least to compute before it."""
        sequence.number = self._numbers
        self._numbers += 1
        if len(self._replicas) > 1:
            works = [_LOAD_SHARE * replica.foreseen(sequence) + replica.load for replica in self._replicas]
            sequence.replica = works.index(min(works))
        self._replicas[sequence.replica].add(sequence)

    def forget_prefixes(self) -> None:
        """Take nothing any more of what has been computed; there must be nothing to do."""
        for replica in self._replicas:
            replica.forget_prefixes()

    def cancel(self, sequence: CachedSequence) -> None:
        """End a request that nobody wants any more; nothing happens where it has ended."""
        if not sequence.is_ended:
            sequence.delivery.end(Finish.CANCELLED)
            self._end(sequence)

    def end_all(self, last: Finish | SphinxError) -> None:
        """End all requests, and tell whoever asked why."""
        for replica in self._replicas:
            for sequence in (*replica.waiting, *replica.running):
                if not sequence.is_ended:
                    sequence.delivery.end(last)
                    self._end(sequence)

    def _end(self, sequence: CachedSequence) -> None:
        """Let go of a request whose listener has heard the last of it."""
        sequence.is_ended = True
        self._counts["finished"] += 1
        self._replicas[sequence.replica].remove(sequence)

    @property
    def waiting(self) -> int:
        """How many requests wait; any thread may ask."""
        return sum(len(replica.waiting) for replica in self._replicas)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do before another request comes."""
        return not any(replica.waiting or replica.running for replica in self._replicas)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """End all requests with the error that something inside raises, which is raised as a SphinxError."""
        try:
            yield
        except SphinxError as error:
            self.end_all(error)
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            failed = EngineError(f"the model cannot compute ({shortened(reason)}); load it again")
            self.end_all(failed)
            raise failed from error

    def step(self) -> bool:
        """Compute one tick; False where there is nothing to compute before a picture is encoded.

        Raises:
            SphinxError: the executor failed; all requests have heard of it, and nothing can be computed any more.
        """
        with self.failing_together():
            return self._step()

    def _step(self) -> bool:
        """Begin to encode pictures, compute one tick, and take what came of an earlier one."""
        for number, replica in enumerate(self._replicas):
            for picture in replica.pictures_to_encode():
                self._executor.encode(picture, number)
        for key, number in self._executor.encoded():
            self._replicas[number].embeddings.come(key)
        planned = [replica.plan() for replica in self._replicas]
        forgotten = tuple(replica.embeddings.told() for replica in self._replicas)
        if not any(planned) and not any(forgotten) and not any(any(tick) for tick in self._under_way):
            return False
        self._under_way.append(planned)
        pieces = tuple(tuple(piece for _, piece in pieces) for pieces in planned)
        outcomes = self._executor.tick(Tick(pieces, forgotten))
        if outcomes is not None:
            for those, theirs in zip(self._under_way.popleft(), outcomes, strict=True):
                for (sequence, piece), outcome in zip(those, theirs, strict=True):
                    self._take(sequence, piece, outcome)
        return True

    def _take(self, sequence: CachedSequence, piece: Piece, outcome: Outcome) -> None:
        """Go on with a sequence of which a piece has been computed."""
        self._replicas[sequence.replica].come_back(sequence, piece)
        if sequence.is_ended:
            return
        if outcome.drawn is not None:
            self._counts["new_tokens"] += 1
            sequence.add(outcome.drawn.token)
        if sequence.delivery.hear(outcome):
            self._end(sequence)

    def load(self) -> Load:
        """Return what the engine is at."""
        pools = [replica.pool for replica in self._replicas]
        return Load(
            waiting=self.waiting,
            running=sum(len(replica.running) for replica in self._replicas),
            cached_places=sum(pool.filled * pool.block for pool in pools),
            places=sum(pool.count * pool.block for pool in pools),
            **self._counts,
        )
