"""A chat in the terminal, or with a pipe: answers stream, Ctrl-C ends one of them, boxes are drawn to a file."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import TextIO

from megatron_sphinx.console import complain
from megatron_sphinx.data.files import renamed
from megatron_sphinx.data.images import decode
from megatron_sphinx.errors import DataError, SphinxError, remedy_of
from megatron_sphinx.generation.answering import Answers, Message
from megatron_sphinx.generation.grounding import draw_groundings, ground_upright
from megatron_sphinx.generation.requests import Chunk, Picture, Sampling
from megatron_sphinx.prepare.shards import file_content

HELP = "/picture PATH  begin anew with a picture\n/clear  begin anew\n/save PATH  write the chat as JSON\nCtrl-D  end"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # which would steer the terminal


def content_of(path: Path) -> bytes:
    """Return the content of a picture's file; raise DataError where it cannot be read."""
    content, fault = file_content(path)
    if fault:
        raise DataError(f"{path}: cannot be read ({fault}); give the path of a picture")
    return content


class Chat:
    """A chat of several turns, about a picture or about none.

    Args:
        answers: the model.
        sampling: how it answers.
        system: what stands before the first question; empty for what the model has there.
        draw: file for the picture with the boxes of the last answer; None where they are not drawn.

    Attributes:
        messages: what was said.
        dropped: how many of the oldest turns were left out for the last answer.
    """

    def __init__(self, answers: Answers, sampling: Sampling, system: str = "", draw: Path | None = None) -> None:
        self._answers, self._sampling, self._draw = answers, sampling, draw
        self._system = [Message("system", system)] if system else []
        self._picture: Picture | None = None
        self._drawable = ""  # the last answer
        self.messages: list[Message] = []
        self.dropped = 0

    def look_at(self, path: Path) -> None:
        """Begin anew, with a picture; what was said is forgotten.

        Raises:
            DataError: the picture cannot be read, or the model has no eyes.
        """
        self._picture = self._answers.picture(content_of(path))
        self.clear()

    def clear(self) -> None:
        """Forget what was said; the picture stays."""
        self.messages = []

    def save(self, path: Path) -> None:
        """Write what was said as JSON; raise DataError where that cannot be."""
        chat = {"model": self._answers.name, "messages": [asdict(one) for one in (*self._system, *self.messages)]}
        try:
            with renamed(path) as partial:
                partial.write_text(json.dumps(chat, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); {remedy_of(error)}") from error

    def ask(self, question: str, show: Callable[[str], None], *, goes_on: bool = False) -> None:
        """Ask a question, and show the answer as it comes.

        Args:
            question: what is asked.
            show: takes the parts of the answer.
            goes_on: whether Ctrl-C ends the answer alone; what has come of it stands then.

        Raises:
            DataError: the question does not fit, and is not kept then.
            SphinxError: the model ended.
        """
        asked = [*self.messages, Message("user", question)]
        chat = self._answers.chat([*self._system, *asked], self._picture, self._sampling.max_new_tokens)
        self.dropped = chat.dropped
        sampling = replace(self._sampling, stop=(*self._sampling.stop, *chat.stop))
        heard: SimpleQueue[Chunk | SphinxError] = SimpleQueue()
        ticket = self._answers.submit(chat.prompt, sampling, heard.put)
        answer, finish = "", None
        self._drawable = ""
        while finish is None:
            try:
                part = heard.get()
                if isinstance(part, SphinxError):
                    raise part
                finish = part.finish
                text = part.text if answer else part.text.lstrip()
                answer += text
                show(text)
            except KeyboardInterrupt:
                ticket.cancel()
                if not goes_on:
                    raise
        self._drawable = answer.strip()
        if self._drawable:
            self.messages = [*asked, Message("assistant", self._drawable)]

    def draw(self) -> None:
        """Draw the boxes and points of the last answer to the file that is for them, and name those that cannot be.

        Raises:
            DataError: the file cannot be written.
        """
        if self._draw is None or self._picture is None or not self._drawable:
            return
        groundings = ground_upright(self._drawable, self._picture, self._answers.padding)
        for fault in (fault for found in groundings for fault in found.faults):
            complain(f"not drawn: {fault}")
        if any(found.colour for found in groundings):
            try:
                draw_groundings(decode(self._picture.content), groundings).save(self._draw)
            except (OSError, ValueError) as error:  # ValueError of an ending that Pillow does not know
                raise DataError(f"--draw={self._draw}: cannot be written ({error}); give another .png") from error


def converse(chat: Chat, questions: Sequence[str], source: TextIO, target: TextIO) -> int:
    """Ask given questions, or those that come in, until there are no more; the exit status.

    In a terminal answers stream; else each is one line, its line breaks as spaces.

    Args:
        chat: to be gone on with.
        questions: if there are any, nothing else is asked.
        source: where questions and commands come from.
        target: where answers go.
    """
    is_shown = source.isatty() and target.isatty() and not questions
    if is_shown:
        import readline  # noqa: F401  # so that input() lets lines be edited

        _tell(target, HELP)
    status = 0
    for line in questions or _lines(source, target, is_prompted=is_shown):
        question = line.strip()
        if not question:
            continue
        try:
            if question.startswith("/") and not questions:
                _obey(chat, question, target if is_shown else sys.stderr)
            else:
                _answer(chat, question, target, is_streamed=is_shown)
        except DataError as error:
            complain(str(error))
            status = 0 if is_shown else error.exit_status
    return status


def _lines(source: TextIO, target: TextIO, *, is_prompted: bool) -> Iterator[str]:
    """Yield the lines that come in; Ctrl-C throws away a line that is being typed."""
    while is_prompted:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            target.write("\n")
        except EOFError:
            target.write("\n")
            return
    yield from source


def _answer(chat: Chat, question: str, target: TextIO, *, is_streamed: bool) -> None:
    """Write an answer, draw its boxes, and say what is to be said about it."""
    parts: list[str] = []

    def show(text: str) -> None:
        target.write(_CONTROLS.sub("", text))
        target.flush()

    try:
        chat.ask(question, show if is_streamed else parts.append, goes_on=is_streamed)
    finally:  # also of a question that cannot be asked, so that answers stay beside their questions
        show(f"{' '.join(''.join(parts).split())}\n")
    chat.draw()
    if chat.dropped:
        complain(f"the {chat.dropped} oldest turns did not fit, and were left out")


def _obey(chat: Chat, line: str, target: TextIO) -> None:
    """Do what a line says that begins with a slash; raise DataError where it cannot be done."""
    command, _, rest = line.partition(" ")
    path = Path(rest.strip()).expanduser()
    if command == "/picture" and rest.strip():
        chat.look_at(path)
        _tell(target, f"a new chat, about {path}")
    elif command == "/clear":
        chat.clear()
        _tell(target, "a new chat")
    elif command == "/save" and rest.strip():
        chat.save(path)
        _tell(target, f"written to {path}")
    else:
        raise DataError(f"{line}: is no command; there are:\n{HELP}")


def _tell(target: TextIO, line: str) -> None:
    target.write(f"{line}\n")
    target.flush()
