"""A model that answers at once or slowly, always the same, and knows what it holds: a stand-in for servers' tests."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from threading import Condition, Thread

from megatron_sphinx.data.images import shape_of
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.generation.answering import ChatPrompt, Listener, Load, Message, QueueFullError, TooLongError
from megatron_sphinx.generation.requests import Chunk, Finish, Picture, Prompt, Sampling, TokenLogprob
from megatron_sphinx.serving.gate import Gate
from megatron_sphinx.serving.limits import Access, Limits
from megatron_sphinx.serving.process import HttpServer

PICTURE_POSITIONS = 7
STOP = "\n###"  # of its template


def echo(question: str, seed: int) -> str:
    """What it answers where nothing else is said: the question, and the seed, which sampling would depend on."""
    return f" You said: {question} ({seed % 1000})"


@dataclass
class _Running:
    """An answer under way; it is its own ticket."""

    owner: "FakeAnswers"
    number: int
    text: str
    sampling: Sampling
    listen: Listener
    cached_tokens: int
    place: int = 0

    def cancel(self) -> None:
        with self.owner.changed:
            if self.owner.held.pop(self.number, None) is None:
                return
            self.owner.finished += 1
        self.listen(Chunk("", finish=Finish.CANCELLED))


@dataclass
class FakeAnswers:
    """Speaks a character a tick for up to `slots` answers at a time; a token is a character's number.

    Attributes:
        script: gives the answer to a question and a seed.
        tick_seconds: between two characters.
        slots: answers that are computed at a time; others wait.
        queue: answers that may be held at all.
        has_vision: as of Answers.
        positions: as of Answers.
        name: as of Answers.
        padding: as of Answers.
        has_thread_error: whether the thread that speaks has ended with an error.
    """

    script: Callable[[str, int], str] = echo
    tick_seconds: float = 0.0
    slots: int = 8
    queue: int = 10_000
    has_vision: bool = True
    positions: int = 4096
    name: str = "fake"
    padding: str = "centre"
    held: dict[int, _Running] = field(default_factory=dict)
    finished: int = 0
    prompts: list[Prompt] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.changed = Condition()
        self._numbers, self._error, self._is_closed = count(), None, False
        self._thread = Thread(target=self._speak, daemon=True)
        self._thread.start()

    def picture(self, content: bytes) -> Picture:
        shape = shape_of(content)
        key = f"{hash(content):x}"
        return Picture(key, content, shape.width, shape.height, (0,), PICTURE_POSITIONS)

    def chat(
        self, messages: Sequence[Message], picture: Picture | None, max_new_tokens: int, _answer_prefix: str = ""
    ) -> ChatPrompt:
        system = [message for message in messages if message.role == "system"]
        turns, dropped = [message for message in messages if message.role != "system"], 0
        while True:
            text = "".join(f"{message.role}:{message.text}\0" for message in [*system, *turns])
            tokens = (1, *[0] * (picture.positions if picture else 0), *map(ord, text))
            if len(tokens) + max_new_tokens <= self.positions:
                return ChatPrompt(Prompt(tokens, picture), dropped, (STOP,))
            if len(turns) < 3:
                raise TooLongError(
                    f"{len(tokens)} tokens and {max_new_tokens} new ones do not fit into {self.positions}; ask for less"
                )
            turns, dropped = turns[2:], dropped + 1

    def submit(self, prompt: Prompt, sampling: Sampling, listen: Listener) -> _Running:
        question = "".join(map(chr, prompt.tokens)).split("user:")[-1].rstrip("\0")
        with self.changed:
            if self._error:
                raise self._error
            if len(self.held) >= self.queue:
                raise QueueFullError(f"{len(self.held)} requests wait already; ask again later")
            cached = 0
            if prompt.picture and any(other.picture and other.picture.key == prompt.picture.key
                                      for other in self.prompts):  # fmt: skip
                cached = 1 + PICTURE_POSITIONS
            self.prompts.append(prompt)
            self.samplings.append(sampling)
            text = self.script(question, sampling.seed)
            one = _Running(self, next(self._numbers), text, sampling, listen, cached)
            self.held[one.number] = one
            self.changed.notify()
        return one

    def token_text(self, token: int) -> str:
        return chr(token)

    def load(self) -> Load:
        if self._error:
            raise self._error
        running = min(len(self.held), self.slots)
        return Load(waiting=len(self.held) - running, running=running, places=64, finished=self.finished,
                    prompt_tokens=sum(len(prompt.tokens) for prompt in self.prompts))  # fmt: skip

    def fail(self, error: SphinxError) -> None:
        """End as a model does that has lost a rank."""
        with self.changed:
            self._error, lost = error, list(self.held.values())
            self.held.clear()
        for one in lost:
            one.listen(error)

    def close(self) -> None:
        with self.changed:
            self._is_closed = True
            self.changed.notify()
        self._thread.join()

    def _speak(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.held or self._is_closed)
                if self._is_closed and not self.held:
                    return
                spoken = [(one, self._next(one)) for one in list(self.held.values())[: self.slots]]
            for one, chunk in spoken:
                one.listen(chunk)
            time.sleep(self.tick_seconds)

    def _next(self, one: _Running) -> Chunk:
        """The next part of an answer, which is taken from those that are held with its last part."""
        sign = one.text[one.place : one.place + 1]
        one.place += 1
        finish = None
        if not sign or any(one.text.startswith(stop, one.place - 1) for stop in one.sampling.stop):
            finish, sign = Finish.STOP, ""
        elif one.place == one.sampling.max_new_tokens:
            finish = Finish.LENGTH
        if finish:
            del self.held[one.number]
            self.finished += 1
        tokens = (ord(sign or "\x02"),)
        logprobs = ()
        if (count := one.sampling.top_logprobs) is not None:
            top = tuple((tokens[0] + n, -0.5 - n if n < 2 else -float("inf")) for n in range(count))
            logprobs = (TokenLogprob(tokens[0], -0.5, top),)
        return Chunk(sign, tokens, logprobs, finish)


@contextmanager
def served(
    answers: FakeAnswers | None, limits: Limits | None = None, access: Access | None = None
) -> Iterator[tuple[str, Gate]]:
    """A server at a free port of this machine: where it listens, and its gate."""
    limits = limits or Limits()
    gate = Gate(answers, limits.requests)
    server = HttpServer(gate, limits, access or Access(), "127.0.0.1", 0, is_quiet=True)
    try:
        yield server.url, gate
    finally:
        server.finish(0)
        if answers is not None:
            answers.close()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that other threads do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened in time"
        time.sleep(0.005)
