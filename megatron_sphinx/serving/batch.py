"""Files of questions answered: many at a time, each once, in a file that is in their order."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock, Semaphore
from time import sleep
from typing import Any

from tqdm import tqdm

from megatron_sphinx.checkpoint.steps import newest_of
from megatron_sphinx.errors import CheckpointError, DataError, SphinxError
from megatron_sphinx.generation.answering import Answers, ChatPrompt, Listener, QueueFullError, Ticket
from megatron_sphinx.generation.grounding import ground_upright, upright_size
from megatron_sphinx.generation.requests import Chunk, Finish, Generation, Picture, Prompt, Sampling
from megatron_sphinx.paths import files_in
from megatron_sphinx.serving.answer_file import AnswerFile
from megatron_sphinx.serving.box_entries import entries_of
from megatron_sphinx.serving.questions import Asking, Question, questions_of
from megatron_sphinx.serving.rows import Source

_OURS = ("answer", "finish", "prompt_tokens", "new_tokens", "boxes", "dropped", "size", "error")
_MOST_SEED = 2**63
_RETRY_SECONDS = 0.05  # until a model that takes no more is asked again


@dataclass(frozen=True)
class BatchReport:
    """What became of the questions.

    Attributes:
        answered: how many have an answer.
        errors: how many have an error instead.
        before: how many of both were there before.
    """

    answered: int
    errors: int
    before: int


@dataclass(frozen=True)
class How:
    """How the questions of a file are asked and answered.

    Attributes:
        asking: how pictures are read.
        sampling: how questions are answered, but for their seeds.
        in_flight: how many questions the model has at a time.
        show: whether there is a progress bar.
        title: what stands before the bar; empty for nothing.
        has_size: whether the line of an answer says how large its upright picture is, as `size`: width and height.
    """

    asking: Asking
    sampling: Sampling
    in_flight: int = 64
    show: bool = False
    title: str = ""
    has_size: bool = False


def answer_all(
    answers: Answers,
    model: Path,
    sources: Sequence[Source],
    target: Path,
    asking: Asking,
    sampling: Sampling,
    *,
    in_flight: int = 64,
    show: bool = False,
) -> BatchReport:
    """Answer all questions of some inputs, and write a JSON line for each, in their order.

    Killed at any time and called again, it asks what is not answered yet, and ends with the same file. A question that
    cannot be asked gets a line with `error`. Question number n is drawn with the seed plus n.

    Args:
        answers: the model.
        model: what it was loaded from.
        sources: the inputs.
        target: the file of answers.
        asking: how rows become questions.
        sampling: how all of them are answered.
        in_flight: how many questions the model has at a time.
        show: whether there is a progress bar.

    Raises:
        DataError: the target was begun with other settings, or cannot be written; an input cannot be read.
        SphinxError: the model ended.
    """
    settings = {
        "model": model_settings(answers, model),
        "sampling": asdict(sampling),
        "asking": {name: str(value) for name, value in asdict(asking).items()},
        "input": {f"{number}: {source.path}": source.state() for number, source in enumerate(sources)},
    }

    def count() -> int | None:
        counts = [source.count() for source in sources]
        return None if None in counts else sum(count for count in counts if count is not None)

    how = How(asking, sampling, in_flight, show)
    return answer_questions(answers, settings, lambda: questions_of(sources, asking), count, target, how)


def answer_questions(
    answers: Answers,
    settings: Mapping[str, Any],
    questions: Callable[[], Iterable[Question]],
    count: Callable[[], int | None],
    target: Path,
    how: How,
) -> BatchReport:
    """Answer questions, wherever they come from, and write a JSON line for each; see `answer_all`.

    Args:
        answers: the model.
        settings: plain values that all answers follow from.
        questions: yields them, always in the same order; not called where all are answered.
        count: returns how many there are, for a progress bar; None where that is not known.
        target: the file of answers.
        how: how they are asked and answered.

    Raises:
        DataError: the target was begun with other settings, or cannot be written; a question's input cannot be read.
        SphinxError: the model ended.
    """
    with AnswerFile(target, settings) as file:
        before = len(file)
        if not file.is_whole:
            bar = {"total": count(), "initial": before, "unit": "row", "dynamic_ncols": True, "mininterval": 1.0}
            with tqdm(**bar, desc=how.title or None, disable=not how.show) as shown:
                _ask_all(_Run(answers, file, how, shown), file, questions())
        file.finish()
        return BatchReport(len(file) - file.errors, file.errors, before)


def model_settings(answers: Answers, model: Path) -> dict[str, Any]:
    """Return what tells the answers of one model from those of another, as plain values.

    Args:
        answers: the model.
        model: what it was loaded from.
    """
    return {**answers.identity, **_identity(model), "name": answers.name, "positions": answers.positions}


def _identity(model: Path) -> dict[str, str]:
    """Return what tells one model from another: its path, of a run its newest checkpoint, and which files are there."""
    with suppress(CheckpointError):  # of what is no run, but a checkpoint
        model = newest_of(model)
    files = [model] if model.is_file() else files_in(model, None, follow_links=True)
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {"path": str(model.resolve()), "files": hashlib.sha256(repr(states).encode()).hexdigest()}


def patiently(hand_in: Callable[[], Ticket], check: Callable[[], None] = lambda: None) -> Ticket:
    """Hand in a request, again and again while too many wait.

    Args:
        hand_in: hands it in.
        check: called before each further time; raises what ended the model.
    """
    while True:
        try:
            return hand_in()
        except QueueFullError:
            sleep(_RETRY_SECONDS)
            check()


def _ask_all(run: "_Run", file: AnswerFile, questions: Iterable[Question]) -> None:
    """Ask what the file does not have, and wait for it."""
    try:
        for number, question in enumerate(questions):
            if number not in file:
                run.ask(number, question)
        run.wait()
    finally:
        run.stop()


class _Run:
    """Questions on their way; answers are written in the thread that brings them.

    Args:
        answers: the model.
        file: of the answers.
        how: how they are asked and answered.
        bar: of the progress.
    """

    def __init__(self, answers: Answers, file: AnswerFile, how: How, bar: Any) -> None:
        self._answers, self._file, self._how, self._bar = answers, file, how, bar
        self._sampling, self._slots = how.sampling, Semaphore(how.in_flight)
        self._lock = Lock()
        self._tickets: dict[int, Ticket] = {}
        self._ended: set[int] = set()
        self._is_over = False
        self._fault: SphinxError | None = None

    def ask(self, number: int, question: Question) -> None:
        """Hand in a question, once there is room for it; raise what ended the model."""
        self._slots.acquire()
        self._check()
        try:
            content = question.content(self._how.asking)
            picture = None if content is None else self._answers.picture(content)
            chat = self._answers.chat(question.messages, picture, self._sampling.max_new_tokens, question.answer_prefix)
            sampling = replace(
                self._sampling,
                seed=(self._sampling.seed + number) % _MOST_SEED,
                stop=(*self._sampling.stop, *chat.stop),
            )
            chunks: list[Chunk] = []
            ticket = self._submit(chat.prompt, sampling, partial(self._hear, number, question, chat, chunks))
        except DataError as error:
            self._end(number, question, {"error": str(error)})
            return
        with self._lock:
            if number not in self._ended:
                self._tickets[number] = ticket

    def _submit(self, prompt: Prompt, sampling: Sampling, listen: Listener) -> Ticket:
        """Hand in a request, again and again while too many wait; raise what ended the model."""
        return patiently(lambda: self._answers.submit(prompt, sampling, listen), self._check)

    def wait(self) -> None:
        """Wait until all questions are answered; raise what ended the model."""
        for _ in range(self._how.in_flight):
            self._slots.acquire()
        self._check()

    def stop(self) -> None:
        """Take back what is still on its way; what comes all the same is not written."""
        with self._lock:
            self._is_over = True
            tickets = list(self._tickets.values())
        for ticket in tickets:
            with suppress(SphinxError):
                ticket.cancel()

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _hear(
        self, number: int, question: Question, chat: ChatPrompt, chunks: list[Chunk], heard: Chunk | SphinxError
    ) -> None:
        """Take a part of an answer, or what came instead of it."""
        if isinstance(heard, DataError):
            self._end(number, question, {"error": str(heard)})
        elif isinstance(heard, SphinxError):
            self._end(number, question, None, heard)
        else:
            chunks.append(heard)
            if heard.finish is Finish.CANCELLED:
                self._end(number, question, None)
            elif heard.finish is not None:
                whole = Generation.of(chunks, len(chat.prompt.tokens))
                counts = {"prompt_tokens": whole.prompt_tokens, "new_tokens": len(whole.tokens)}
                shown = chat.prompt.picture
                more: dict[str, Any] = {"boxes": self._boxes(whole.text, shown), "dropped": chat.dropped}
                if self._how.has_size and shown is not None:
                    more["size"] = upright_size(shown)
                line = {"answer": whole.text, "finish": whole.finish.value, **counts}
                self._end(number, question, line | {name: value for name, value in more.items() if value})

    def _boxes(self, text: str, picture: Picture | None) -> list[dict[str, Any]]:
        """Return the boxes and points in an answer, in pixels of the picture."""
        if picture is None:
            return []
        return entries_of(text, ground_upright(text, picture, self._answers.padding))

    def _end(
        self, number: int, question: Question, line: dict[str, Any] | None, fault: SphinxError | None = None
    ) -> None:
        """Write what a question came to, unless nothing did, and let the next one have its place."""
        with self._lock:
            self._ended.add(number)
            self._tickets.pop(number, None)
            self._fault = self._fault or fault
            if line is not None and self._fault is None and not self._is_over:
                own = {f"input.{name}" if name in _OURS else name: value for name, value in question.columns.items()}
                try:
                    self._file.add(number, {**own, **line})
                except DataError as error:
                    self._fault = error
                self._bar.update()
                self._bar.set_postfix(errors=self._file.errors, refresh=False)
        self._slots.release()
