"""How many of easy-vqa's test questions a run answers exactly, by generation.

    examples/vqa_evaluate.py RUN_FOLDER [RANDOM_RUN_FOLDER]

Prints a table and writes summary.json into RUN_FOLDER. Each question is asked alone, once with the prompt for a short
answer and once without it, and all questions about a picture are asked in one chat. The second run is the control: the
same, but for an expert with random weights.
"""

import argparse
import json
import queue
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.generation.answering import Answers, Message
from megatron_sphinx.generation.requests import Chunk, Generation, Picture, Sampling
from megatron_sphinx.prepare.tasks import PROMPTS
from megatron_sphinx.serving import model as serving
from megatron_sphinx.training import metrics

Question = Mapping[str, str]  # image, question, answer

KINDS = {
    "yes or no": {"yes", "no"},
    "shape": {"circle", "rectangle", "triangle"},
    "colour": {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"},
    "all": set[str](),
}
LONGEST = 8  # tokens of an answer
UNDER_WAY = 64  # pictures at a time, less than a model lets wait


class Dialog:
    """Questions about one picture that are asked of a model one behind the other, each knowing the answers before it.

    Attributes:
        questions: what is asked.
        answers: what the model has answered so far.
    """

    def __init__(self, model: Answers, picture: Picture, questions: Sequence[Question], form: str) -> None:
        self.questions = questions
        self.answers: list[str] = []
        self._model, self._picture, self._form = model, picture, form
        self._said: list[Message] = []

    def ask(self, ended: "Ended") -> None:
        """Hand the next question in; this is put into a queue once it is answered, or the error that ended it."""
        text = self._form.format(question=self.questions[len(self.answers)]["question"])
        self._said.append(Message("user", text))
        asked = self._model.chat(self._said, self._picture, LONGEST)
        chunks: list[Chunk] = []

        def listen(heard: Chunk | SphinxError) -> None:
            if isinstance(heard, SphinxError):
                ended.put(heard)
                return
            chunks.append(heard)
            if heard.finish is not None:
                self.answers.append(Generation.of(chunks, len(asked.prompt.tokens)).text)
                self._said.append(Message("assistant", self.answers[-1]))
                ended.put(self)

        self._model.submit(asked.prompt, Sampling(max_new_tokens=LONGEST, stop=asked.stop), listen)


Ended = queue.SimpleQueue[Dialog | SphinxError]


def answers(model: Answers, pictures: Path, dialogs: Sequence[Sequence[Question]], form: str) -> Iterator[list[str]]:
    """Ask all questions, many at a time; yield the answers of each dialog, in order.

    Args:
        model: what is asked.
        pictures: the folder of the images.
        dialogs: the questions of each, all about one picture.
        form: of a question, with {question} in it.

    Raises:
        SphinxError: what the model could not go on after.
    """
    made: list[Dialog] = []
    ended: Ended = queue.SimpleQueue()
    waiting, running = deque(dialogs), 0
    while waiting or running:
        while waiting and running < UNDER_WAY:
            questions = waiting.popleft()
            picture = model.picture((pictures / questions[0]["image"]).read_bytes())
            made.append(Dialog(model, picture, questions, form))
            made[-1].ask(ended)
            running += 1
        dialog = ended.get()
        if isinstance(dialog, SphinxError):
            raise dialog
        if len(dialog.answers) < len(dialog.questions):
            dialog.ask(ended)
        else:
            running -= 1
    yield from (dialog.answers for dialog in made)


def accuracy(asked: Sequence[Question], answered: Sequence[str]) -> dict[str, float]:
    """Compute the share of exact answers, for each kind of question and for all of them."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for question, answer in zip(asked, answered, strict=True):
        for kind in (kind_of(question), "all"):
            right[kind].append(answer == question["answer"])
    return {kind: sum(each) / max(1, len(each)) for kind, each in right.items()}


def kind_of(question: Question) -> str:
    """Return the kind of a question, which its right answer tells."""
    return next(kind for kind, words in KINDS.items() if question["answer"] in words)


def blind(asked: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Compute what can be reached without looking: with one answer to each kind of question, or to each question.

    The answers are the most frequent ones of the test itself, so nothing that is blind can reach more.
    """
    by_kind = most_frequent((kind_of(question), question["answer"]) for question in asked)
    by_text = most_frequent((question["question"], question["answer"]) for question in asked)
    (overall,) = most_frequent(("all", question["answer"]) for question in asked).values()
    of_kind = accuracy(asked, [by_kind[kind_of(question)] for question in asked])
    of_all = accuracy(asked, [overall] * len(asked))
    return {
        "one answer": of_kind | {"all": of_all["all"]},
        "question alone": accuracy(asked, [by_text[question["question"]] for question in asked]),
    }


def most_frequent(answered: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the most frequent of the answers to each of the things that were asked."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for asked, answer in answered:
        counts[asked][answer] += 1
    return {asked: count.most_common(1)[0][0] for asked, count in counts.items()}


def evaluate(folder: Path, test: Path, asked: Sequence[Question], is_control: bool) -> dict[str, dict[str, float]]:
    """Measure how many questions the newest checkpoint of a run answers, asked in each way; the control in one way."""
    model = serving.load(folder)
    alone = [[question] for question in asked]
    ways = {"alone": (alone, PROMPTS["vqa"])}
    if not is_control:
        chats = [list(questions) for _, questions in groupby(asked, lambda question: question["image"])]
        ways |= {"without prompt": (alone, "{question}"), "in a chat": (chats, PROMPTS["vqa"])}
    found = {}
    for way, (dialogs, form) in ways.items():
        answered = [answer for each in answers(model, test / "images", dialogs, form) for answer in each]
        found[way] = accuracy(asked, answered)
    model.close()
    return found


def main() -> int:
    """Evaluate the run; the exit status of the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("random_run", type=Path, nargs="?")
    parser.add_argument("--test", type=Path, default=Path("data/vqa/test"), help="what examples/vqa_data.py has made")
    parser.add_argument("--started", type=float, help="when it all began, in seconds since 1970")
    args = parser.parse_args()
    asked = [json.loads(line) for line in (args.test / "questions.jsonl").read_text().splitlines()]
    columns = evaluate(args.run, args.test, asked, False)
    if args.random_run:
        columns["random expert"] = evaluate(args.random_run, args.test, asked, True)["alone"]
    columns |= blind(asked)
    counts = Counter(kind_of(question) for question in asked) | Counter({"all": len(asked)})
    print(f"{'':10}{'questions':>10}" + "".join(f"{name:>16}" for name in columns))
    for kind in KINDS:
        print(f"{kind:10}{counts[kind]:10}" + "".join(f"{column[kind]:16.1%}" for column in columns.values()))
    lines = metrics.read(args.run / "metrics.jsonl")
    seconds = time.time() - args.started if args.started else sum(line["step_seconds"] for line in lines)
    print(f"{len(lines)} steps; {seconds:.0f} seconds")
    summary = {"questions": counts, "accuracy": columns, "steps": len(lines), "seconds": round(seconds, 1)}
    (args.run / "summary.json").write_text(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
