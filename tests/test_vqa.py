"""The picture-talker: how its data is made of the package's, and how its answers are counted."""

import itertools
import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw

from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError
from megatron_sphinx.generation.requests import Chunk, Finish, Picture, Prompt
from megatron_sphinx.serving import model as serving

EXAMPLES = Path(__file__).parents[1] / "examples"
COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture
def package(tmp_path):
    """A folder as easy-vqa has it: of each part 24 pictures, each asked about everything."""
    rng = random.Random(3)
    for part in ("train", "test"):
        asked, folder = [], tmp_path / "package" / part
        (folder / "images").mkdir(parents=True)
        for number, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES)):
            picture = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(picture).regular_polygon((32, 32, 20), SHAPES.index(shape) + 3, fill=colour)
            picture.save(folder / "images" / f"{number}.png")
            asked += [["what color is the shape?", colour, number], ["what shape is present?", shape, number]]
            for word in (*COLOURS, *SHAPES):
                yes, no = ("yes", "no") if word in (colour, shape) else ("no", "yes")
                asked.append([f"is there a {word} shape in the image?", yes, number])
                asked.append([f"does the image not contain a {word} shape?", no, number])
                asked.append([f"is no {word} shape present?", no, number])
        rng.shuffle(asked)
        (folder / "questions.json").write_text(json.dumps(asked))
    return tmp_path / "package"


def test_the_data(run_example, package, tmp_path):
    folder = tmp_path / "vqa"
    said = run_example("vqa_data.py", folder, "--package", package)
    assert said == f"{folder}: 24 dialogs, {24 * 35} questions held out\n"
    assert run_example("vqa_data.py", folder, "--package", package) == said  # there already
    tokenizer = Tokenizer(folder / "tokenizer.model")
    assert len(tokenizer.encode("yes\n###")) == 3
    assert tokenizer.decode(tokenizer.encode("a b  c\n###\nd")) == "a b  c\n###\nd"
    assert (folder / "efficientnet_lite0.pth").stat().st_size > 10**7
    index, firsts = SampleIndex([folder / "conversations"], "conversations"), set()
    for sample in range(24):
        tokens = index.caption(sample)
        turns = [turn.split("\n### Assistant: ") for turn in tokenizer.decode(tokens.tolist()).split(" Human: ")[1:]]
        seen = {answer.removesuffix("\n###") for _, answer in turns} - {"yes", "no"}
        present = [question for question, _ in turns if seen & set(question.replace("?", "").split())]
        assert (len(seen), len(present), len(turns)) == (2, 6, 2 + 6 + 18)  # of 27 about what is not there
        is_learned = index.is_target(sample, len(tokens))[:-1]
        learned = "".join(tokenizer.decode([token]) for token in tokens[is_learned].tolist())
        assert learned == "".join(answer for _, answer in turns)
        firsts.add(turns[0][0].removesuffix(SHORT))
    assert len(firsts) > 5


class Knows:
    """A model that looks the right answer up, but for questions that it answers by nothing.

    Attributes:
        chats: all messages of each request.
        most: pictures that were asked about at the same time, at most.
    """

    name, positions, padding, has_vision = "knows", 512, "centre", True

    def __init__(self, answers: dict, is_wrong, fails: bool = False) -> None:
        self.chats: list[tuple[str, ...]] = []
        self.most = self._running = 0
        self._answers, self._is_wrong, self._fails = answers, is_wrong, fails
        self._lock = threading.Lock()

    def picture(self, content: bytes) -> Picture:
        return Picture(content.decode(), content, 64, 64, (0,), 19)

    def chat(self, messages, picture, max_new_tokens, answer_prefix=""):
        with self._lock:
            self.chats.append(tuple(message.text for message in messages))
            return SimpleNamespace(prompt=Prompt((len(self.chats) - 1,), picture), stop=("\n###",), dropped=0)

    def submit(self, prompt, sampling, listen):
        assert sampling.stop == ("\n###",)
        asked = self.chats[prompt.tokens[0]][-1]
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)

        def answer():
            with self._lock:
                self._running -= 1
            if self._fails:
                listen(DataError("the picture fell down"))
                return
            listen(Chunk(" " if self._is_wrong(asked) else f" {self._answers[prompt.picture.key, asked]}", (1,)))
            listen(Chunk("", (2,), finish=Finish.STOP))

        threading.Timer(random.random() / 1000, answer).start()

    def close(self) -> None:
        pass


@pytest.fixture
def exam(tmp_path):
    """A folder of 100 test pictures, which are but their names, and the answers to what is asked about them."""
    (tmp_path / "test" / "images").mkdir(parents=True)
    records, answers = [], {}
    for number in range(100):
        colour, shape = COLOURS[number % 8], SHAPES[number % 3]
        (tmp_path / "test" / "images" / f"{number}.png").write_text(f"{number}")
        for question, answer in (
            ("what color is it?", colour), ("what shape is it?", shape), ("is it red?", "no"), ("is it here?", "yes")
        ):  # fmt: skip
            records.append({"image": f"{number}.png", "question": question, "answer": answer})
            answers |= {(f"{number}", question): answer, (f"{number}", question + SHORT): answer}
    (tmp_path / "test" / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("run", "control"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 0, "step_seconds": 3.0}) + "\n")
    return SimpleNamespace(folder=tmp_path, answers=answers, test=tmp_path / "test")


def test_the_table(run_example, exam, monkeypatch):
    models = {
        "run": Knows(exam.answers, lambda asked: asked == "what color is it?"),
        "control": Knows(exam.answers, lambda asked: "what" in asked or "here" in asked),
    }
    monkeypatch.setattr(serving, "load", lambda folder: models[folder.name])
    said = run_example("vqa_evaluate.py", exam.folder / "run", exam.folder / "control", "--test", exam.test)
    found = json.loads((exam.folder / "run" / "summary.json").read_text())
    every = {"yes or no": 1.0, "shape": 1.0, "colour": 1.0, "all": 1.0}
    assert found["accuracy"] == {
        "alone": every,
        "without prompt": every | {"colour": 0.0, "all": 0.75},
        "in a chat": every,
        "random expert": {"yes or no": 0.5, "shape": 0.0, "colour": 0.0, "all": 0.25},
        "one answer": {"yes or no": 0.5, "shape": 0.34, "colour": 0.13, "all": 0.25},
        "question alone": {"yes or no": 1.0, "shape": 0.34, "colour": 0.13, "all": 0.6175},
    }
    assert found["questions"] == {"yes or no": 200, "shape": 100, "colour": 100, "all": 400}
    assert [line.split() for line in said.splitlines()[1:5]][2] == [
        "colour", "100", "100.0%", "0.0%", "100.0%", "0.0%", "13.0%", "13.0%",
    ]  # fmt: skip
    assert said.endswith("1 steps; 3 seconds\n")
    chats = [chat for chat in models["run"].chats if len(chat) == 7]
    assert len(chats) == 100
    assert all(chat[2] == "what shape is it?" + SHORT and chat[5] == "no" for chat in chats)
    assert 2 < models["run"].most <= 64
    assert len(models["control"].chats) == 400


def test_what_a_model_cannot_go_on_after_ends_the_evaluation(run_example, exam, monkeypatch):
    model = Knows(exam.answers, lambda asked: False, fails=True)
    monkeypatch.setattr(serving, "load", lambda folder: model)
    with pytest.raises(DataError, match="the picture fell down"):
        run_example("vqa_evaluate.py", exam.folder / "run", "--test", exam.test)
