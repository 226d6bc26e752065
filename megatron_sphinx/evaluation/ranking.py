"""Benchmarks of classes answered by ranking: the likeliest of all sentences that name a class, without generating."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from megatron_sphinx.errors import DataError, SphinxError
from megatron_sphinx.evaluation.benchmark import Benchmark
from megatron_sphinx.evaluation.questions import questions_of
from megatron_sphinx.evaluation.samples import Protocol, Sample
from megatron_sphinx.generation.answering import ChatPrompt, Scorer, Ticket
from megatron_sphinx.generation.grounding import upright_size
from megatron_sphinx.generation.ranking import Search, Step, TokenTree
from megatron_sphinx.generation.requests import Chunk, Finish, Prompt
from megatron_sphinx.generation.service import ClosedError
from megatron_sphinx.serving.answer_file import AnswerFile
from megatron_sphinx.serving.batch import BatchReport, How, patiently
from megatron_sphinx.serving.questions import Question

_MOST = 5  # classes that are told, the likeliest first


@dataclass
class RankingWork:
    """What a ranking took, this time.

    Attributes:
        pictures: how many were looked at.
        classes: that were ranked for each.
        requests: that the model was asked; each scores the beginning of a sentence, and all that may come next.
        tokens: that it computed for them, without those that were in the prefix cache.
    """

    pictures: int = 0
    classes: int = 0
    requests: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        of_each = max(1, self.pictures)
        return (
            f"{self.requests / of_each:.1f} requests and {self.tokens / of_each:.0f} tokens a picture to rank "
            f"{self.classes} classes"
        )


@dataclass
class _Asked:
    """A question whose classes are being ranked.

    Attributes:
        number: of the question.
        question: what is asked.
        sample: what it is about.
        chat: the question made ready.
        search: for its likeliest classes.
        step: what the model is scoring.
        ticket: of that.
    """

    number: int
    question: Question
    sample: Sample
    chat: ChatPrompt
    search: Search
    step: Step
    ticket: Ticket


def rank_questions(
    model: Scorer,
    settings: dict[str, Any],
    benchmark: Benchmark,
    samples: Sequence[Sample],
    protocol: Protocol,
    target: Path,
    how: How,
) -> tuple[BatchReport, RankingWork]:
    """Rank the classes of each sample, and write a JSON line for each: the likeliest sentence is the answer.

    The ranking is exact, as if each sentence were scored whole, with what ends it. Killed and called again, it ranks
    what is not there yet, and ends with equal classes in equal order.

    Args:
        model: says how likely the sentences are.
        settings: plain values that all answers follow from.
        benchmark: has the form of the sentences.
        samples: with the classes, as their choices.
        protocol: whose prompts are asked.
        target: the file of answers.
        how: how many pictures the model has at a time, and whether there is a progress bar.

    Raises:
        DataError: the target was begun with other settings, or cannot be written; or the sentences of two classes are
            the same to the model.
        SphinxError: the model ended.
    """
    with AnswerFile(target, settings) as file:
        before = len(file)
        run = _Run(model, file, benchmark, how)
        if not file.is_whole:
            bar = {"total": len(samples), "initial": before, "unit": "row", "dynamic_ncols": True, "mininterval": 1.0}
            with tqdm(**bar, desc=how.title or None, disable=not how.show) as shown:
                run.rank(samples, protocol, shown)
        file.finish()
        return BatchReport(len(file) - file.errors, file.errors, before), run.work


class _Run:
    """Pictures whose classes are being ranked, many at a time; all is done in the thread that calls `rank`.

    Args:
        model: says how likely sentences are.
        file: of the answers.
        benchmark: has the form of the sentences.
        how: how questions are asked.

    Attributes:
        work: what it took so far.
    """

    def __init__(self, model: Scorer, file: AnswerFile, benchmark: Benchmark, how: How) -> None:
        self._model, self._file, self._benchmark, self._how = model, file, benchmark, how
        self._trees: dict[tuple[str, ...], TokenTree] = {}
        self._heard: SimpleQueue[tuple[int, Chunk | SphinxError]] = SimpleQueue()
        self._running: dict[int, _Asked] = {}
        self.work = RankingWork()

    def rank(self, samples: Sequence[Sample], protocol: Protocol, bar: Any) -> None:
        """Rank the classes of those samples that the file does not have; raise what ended the model."""
        questions = enumerate(zip(questions_of(self._benchmark, samples, protocol), samples, strict=True))
        waiting = (one for one in questions if one[0] not in self._file)
        try:
            while True:
                for number, (question, sample) in islice(waiting, self._how.in_flight - len(self._running)):
                    if not self._begin(number, question, sample):
                        bar.update()
                if not self._running:
                    return
                if self._go_on(*self._heard.get()):
                    bar.update()
        finally:
            for asked in self._running.values():
                asked.ticket.cancel()

    def _tree(self, classes: tuple[str, ...]) -> TokenTree:
        """Return the tree of the sentences of some classes."""
        if classes not in self._trees:
            sentences = [self._benchmark.sentence.format(choice=name) for name in classes]
            self._trees[classes] = TokenTree([self._model.answer_tokens(sentence) for sentence in sentences])
        return self._trees[classes]

    def _begin(self, number: int, question: Question, sample: Sample) -> bool:
        """Ask the first of a question; False where it cannot be asked."""
        search = Search(self._tree(sample.choices), _MOST)
        try:
            content = question.content(self._how.asking)
            picture = None if content is None else self._model.picture(content)
            chat = self._model.chat(question.messages, picture, self._how.sampling.max_new_tokens)
            step = search.next_step()
            assert step is not None, "there are no classes"
            ticket = self._ask(number, chat.prompt, step)
        except DataError as error:
            self._file.add(number, {**question.columns, "error": str(error)})
            return False
        self._running[number] = _Asked(number, question, sample, chat, search, step, ticket)
        self.work.pictures += 1
        self.work.classes = len(sample.choices)
        return True

    def _ask(self, number: int, prompt: Prompt, step: Step) -> Ticket:
        """Hand in what a search has to know next."""
        whole = Prompt((*prompt.tokens, *step.prefix), prompt.picture)
        listen = partial(self._hear, number)
        return patiently(lambda: self._model.submit_score(whole, step.continuation, listen, step.choices))

    def _hear(self, number: int, heard: Chunk | SphinxError) -> None:
        """Hand over what the model says, in its thread."""
        self._heard.put((number, heard))

    def _go_on(self, number: int, heard: Chunk | SphinxError) -> bool:
        """Take what was scored and ask on; True where a question is done."""
        asked = self._running[number]
        if isinstance(heard, SphinxError):
            raise heard
        if heard.finish is Finish.CANCELLED:
            raise ClosedError("the model was closed before it had ranked all; load it again")
        step, prompt = asked.step, asked.chat.prompt
        computed = len(prompt.tokens) + len(step.prefix) + len(step.continuation) - (not step.choices)
        self.work.requests += 1
        self.work.tokens += computed - asked.ticket.cached_tokens
        asked.search.take([one.logprob for one in heard.logprobs])
        if (following := asked.search.next_step()) is not None:
            asked.step, asked.ticket = following, self._ask(number, prompt, following)
            return False
        del self._running[number]
        self._file.add(number, self._line(asked))
        return True

    def _line(self, asked: _Asked) -> dict[str, Any]:
        """Return the line of a question whose classes are ranked."""
        classes = asked.sample.choices
        ranked = [[classes[number], round(logprob, 6)] for number, logprob in asked.search.found]
        line = {"answer": self._benchmark.sentence.format(choice=ranked[0][0]), "ranked": ranked,
                "prompt_tokens": len(asked.chat.prompt.tokens), "requests": asked.search.steps}  # fmt: skip
        picture = asked.chat.prompt.picture
        size = {} if picture is None else {"size": upright_size(picture)}
        return {**asked.question.columns, **line, **size}
