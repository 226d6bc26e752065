"""What becomes of drawn tokens: text for whoever asked, in chunks, until the answer ends."""

from collections.abc import Callable, Collection
from typing import Protocol

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.generation.answering import Listener
from megatron_sphinx.generation.requests import Chunk, Finish, Sampling, TokenLogprob
from megatron_sphinx.generation.ticks import Outcome


class TextFeed(Protocol):
    """Makes text of an answer's tokens, one after the other; `stopping.Detokenizer` does."""

    def feed(self, token: int) -> tuple[str, bool]:
        """Return the text that can be shown now, and whether a stop string has come."""

    def rest(self) -> str:
        """Return the text that was held back."""


TextFeeds = Callable[[tuple[str, ...]], TextFeed]  # makes one for an answer with these stop strings


class Delivery(Protocol):
    """What a request is for: an answer, or the likelihood of one."""

    def hear(self, outcome: Outcome) -> bool:
        """Take what a piece of the request gave; whether the request is done with it."""

    def begin_again(self) -> None:
        """Note that all tokens that are known will be computed once more."""

    def end(self, last: Finish | SphinxError) -> None:
        """Tell whoever asked that the request ends before it is done, and why."""


class _Told:
    """Somebody who asked, and whether they still listen.

    A listener that raises an error is not called again, and its request ends: nobody else's answer suffers from it.
    """

    def __init__(self, listen: Listener) -> None:
        self._listen = listen
        self.is_gone = False

    def tell(self, what: Chunk | SphinxError) -> None:
        """Call the listener, if it is there."""
        if self.is_gone:
            return
        try:
            self._listen(what)
        except Exception:
            self.is_gone = True


class AnswerDelivery:
    """Gives an answer in chunks.

    Args:
        listen: hears them.
        sampling: says where the answer ends.
        ends: ids that end an answer, EOS above all.
        text: makes the answer's text.
    """

    def __init__(self, listen: Listener, sampling: Sampling, ends: Collection[int], text: TextFeed) -> None:
        self._told, self._sampling, self._text = _Told(listen), sampling, text
        self._ends = () if sampling.ignore_eos else ends
        self._drawn = 0
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def hear(self, outcome: Outcome) -> bool:
        """Take a drawn token, if one was drawn; whether the answer ends with it, or nobody listens."""
        if (drawn := outcome.drawn) is None:
            return False
        self._drawn += 1
        self._tokens.append(drawn.token)
        if self._sampling.top_logprobs is not None:
            self._logprobs.append(drawn)
        finish = None
        if drawn.token in self._ends:
            finish, text = Finish.STOP, self._text.rest()
        else:
            text, is_stopped = self._text.feed(drawn.token)
            if is_stopped:
                finish = Finish.STOP
            elif self._drawn == self._sampling.max_new_tokens:
                finish, text = Finish.LENGTH, text + self._text.rest()
        if text or finish:
            self._tell(text, finish)
        return finish is not None or self._told.is_gone

    def _tell(self, text: str, finish: Finish | None) -> None:
        """Give a chunk, with the tokens that were drawn since the last one."""
        chunk = Chunk(text, tuple(self._tokens), tuple(self._logprobs), finish)
        self._tokens, self._logprobs = [], []
        self._told.tell(chunk)

    def begin_again(self) -> None:
        """Do nothing: what was drawn stays."""

    def end(self, last: Finish | SphinxError) -> None:
        """End the answer early: what was held back is shown only where it is not an error that ends it."""
        if isinstance(last, SphinxError):
            self._told.tell(last)
        else:
            self._tell(self._text.rest(), last)


class ScoreDelivery:
    """Gives the log-probabilities of tokens, in one chunk that ends by its length.

    Args:
        listen: hears it.
        scored: ids of the tokens.
    """

    def __init__(self, listen: Listener, scored: tuple[int, ...]) -> None:
        self._told, self._scored = _Told(listen), scored
        self._scores: list[float] = []

    def hear(self, outcome: Outcome) -> bool:
        """Take log-probabilities of the next tokens; whether all are there."""
        self._scores += outcome.scores
        if len(self._scores) < len(self._scored):
            return False
        logprobs = tuple(TokenLogprob(*pair) for pair in zip(self._scored, self._scores, strict=True))
        self._told.tell(Chunk("", self._scored, logprobs, Finish.LENGTH))
        return True

    def begin_again(self) -> None:
        """Forget the log-probabilities that are there, since all will come once more."""
        self._scores.clear()

    def end(self, last: Finish | SphinxError) -> None:
        """End early, without any log-probabilities."""
        self._told.tell(last if isinstance(last, SphinxError) else Chunk("", finish=last))
