"""A model for tests of what is around one: its answers follow from the question alone, a word at a time."""

import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from types import MappingProxyType

from megatron_sphinx.data.images import shape_of
from megatron_sphinx.errors import DataError
from megatron_sphinx.generation.answering import ChatPrompt, Listener, Load, Message
from megatron_sphinx.generation.requests import Chunk, Finish, Picture, Prompt, Sampling
from megatron_sphinx.serving.batch import answer_all
from megatron_sphinx.serving.questions import Asking
from megatron_sphinx.serving.rows import sources_of


class _Ticket:
    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Double:
    """Answers with what `answer` makes of the messages; `seconds` for each word, in threads, in any order.

    Attributes:
        asked: the last question of each chat that was handed in.
        most: how many were on their way at once, at most.
    """

    name, positions, padding, replicas = "double", 1000, "centre", 1
    identity: Mapping[str, str] = MappingProxyType({"template": "double", "precision": "fp32"})

    def __init__(
        self, answer: Callable[[Sequence[Message], Picture | None], str], seconds: float = 0.0, dropped: int = 0
    ) -> None:
        self._answer, self._seconds, self._dropped = answer, seconds, dropped
        self._chats: dict[int, str] = {}
        self.asked: list[str] = []
        self.prefixes: list[str] = []
        self.sampled: list[Sampling] = []
        self.finished: Counter[Finish] = Counter()
        self.most = self._now = 0

    def __enter__(self) -> "Double":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def picture(self, content: bytes) -> Picture:
        shape = shape_of(content)
        return Picture(hashlib.sha256(content).hexdigest(), content, shape.width, shape.height, (0,), 4)

    def chat(
        self, messages: Sequence[Message], picture: Picture | None, max_new_tokens: int, answer_prefix: str = ""
    ) -> ChatPrompt:
        if len(messages[-1].text) + max_new_tokens > self.positions:
            raise DataError(f"too long: {len(messages[-1].text)} + {max_new_tokens}; ask less")
        self.asked.append(messages[-1].text)
        self.prefixes.append(answer_prefix)
        self._chats[len(self._chats)] = self._answer(messages, picture)
        return ChatPrompt(Prompt((1, len(self._chats) - 1), picture), self._dropped, ("###",))

    def submit(self, prompt: Prompt, sampling: Sampling, listen: Listener) -> _Ticket:
        ticket = _Ticket()
        self.sampled.append(sampling)
        self._now += 1
        self.most = max(self.most, self._now)
        Thread(target=self._run, args=(self._chats[prompt.tokens[1]], ticket, listen), daemon=True).start()
        return ticket

    def _run(self, text: str, ticket: _Ticket, listen: Listener) -> None:
        finish = Finish.STOP
        for word in text.split(" "):
            if self._seconds:
                time.sleep(random.uniform(0, 2 * self._seconds))
            if ticket.is_cancelled:
                finish = Finish.CANCELLED
                break
            listen(Chunk(f" {word}", (7,)))
        self._now -= 1
        self.finished[finish] += 1
        listen(Chunk("", (2,), finish=finish))

    def load(self) -> Load:
        return Load(finished=self.finished.total())


def caption(messages: Sequence[Message], picture: Picture | None) -> str:
    """An answer that tells its question and picture."""
    size = f" {picture.width}x{picture.height}" if picture else ""
    return f"{messages[-1].text}?{size} " + "yes " * (len(messages[-1].text) % 5)


def main(source: str, target: str, log: str) -> None:
    """Answer a file in a process that can be killed; what is asked goes to a log."""

    def answer(messages: Sequence[Message], picture: Picture | None) -> str:
        with Path(log).open("a") as file:
            file.write(f"{messages[-1].text}\n")
        return caption(messages, picture)

    double = Double(answer, seconds=0.004)
    answer_all(double, Path("m"), sources_of([Path(source)]), Path(target), Asking(), Sampling(), in_flight=4)


if __name__ == "__main__":
    main(*sys.argv[1:])
