"""The evaluation end to end: what scenes say of themselves is true, and readers of benchmarks read its files."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from answers_double import Double
from PIL import Image

from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.evaluation.benchmarks.registry import named
from megatron_sphinx.evaluation.report import write_report
from megatron_sphinx.evaluation.run import Wanted, agree, answer_benchmark
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.generation.requests import Sampling
from megatron_sphinx.prepare.boxes import format_box
from megatron_sphinx.prepare.tasks import PROMPTS

EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = ("vqav2_val", "gqa", "pope_random", "refcoco_val", "classes")
QUESTIONS = {  # about each of the pictures, by the colour of its shape
    "what color is the shape?": lambda colour: colour,
    "is there a red shape in the image?": lambda colour: "yes" if colour == "red" else "no",
    "is no red shape present?": lambda colour: "no" if colour == "red" else "yes",
}
PICTURES = ("red", "blue", "teal", "green", "red")
TESTS = 4


@pytest.fixture
def scenes(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import scenes

    return scenes


@pytest.fixture
def made(run_example, tmp_path):
    """A folder of data made of five pictures as examples/vqa_data.py leaves them, and of few scenes."""
    images = tmp_path / "vqa" / "test" / "images"
    images.mkdir(parents=True)
    lines = []
    for number, colour in enumerate(PICTURES):
        Image.new("RGB", (64, 64), colour).save(images / f"{number}.png")
        lines += [{"image": f"{number}.png", "question": asked, "answer": answer(colour)}
                  for asked, answer in QUESTIONS.items()]  # fmt: skip
    (images.parent / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, colour in enumerate(PICTURES):
        place = tmp_path / "classes" / "test" / "classes" / colour
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), colour).save(place / f"{number}.jpg")
    folder = tmp_path / "made"
    options = ("--vqa", tmp_path / "vqa", "--classes", tmp_path / "classes", "--scenes", 12, "--tests", TESTS)
    said = run_example("evaluate_data.py", folder, *options)
    assert said.startswith(f"{folder}: 12 dialogs about scenes; tests: {TESTS * len(QUESTIONS)} questions, ")
    assert run_example("evaluate_data.py", folder, *options) == said  # there already
    return folder


def test_boxes_of_scenes_are_those_of_what_is_painted(scenes):
    """Shapes of one colour are told apart by their boxes; all pixels of the colour are in the box, up to its sides."""
    shapes = Counter()
    for scene in scenes.scenes(7, 60):
        pixels = np.asarray(scene.picture())
        painted = np.zeros(pixels.shape[:2], bool)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            part = (pixels[top:bottom, left:right] != 255).any(-1)
            assert part.any(0).all(), thing
            assert part.any(1).all(), thing
            full = {"circle": np.pi / 4, "rectangle": 1.0, "triangle": 0.5}[thing.shape]
            assert part.mean() == pytest.approx(full, abs=0.05)
            assert len(np.unique(pixels[top:bottom, left:right][part], axis=0)) == 1
            painted[top:bottom, left:right] = True
            shapes[thing.shape, len(scene.things)] += 1
        assert (pixels[~painted] == 255).all()
    assert len(shapes) == len(scenes.SHAPES) * 2


def test_a_sentence_is_true_of_one_shape_alone(scenes):
    def is_meant(sentence: str, thing, others) -> bool:
        words = sentence.split()
        looks = [word for word in words[1:] if word not in ("shape", "on", "the", "left", "right")]
        likes = [one for one in others if all(word in (one.colour, one.shape) for word in looks)]
        if "left" in words:
            likes = [min(likes, key=lambda one: one.box[0])]
        if "right" in words:
            likes = [max(likes, key=lambda one: one.box[2])]
        return likes == [thing]

    said = Counter()
    for scene in scenes.scenes(8, 300):
        for thing in scene.things:
            sentences = scene.sentences(thing)
            assert sentences
            assert all(is_meant(sentence, thing, scene.things) for sentence in sentences), (sentences, scene)
            said.update(sentence.split()[-1] for sentence in sentences)
    assert set(said) == {"left", "right", "shape", *scenes.SHAPES}


def test_scenes_follow_from_the_seed(scenes):
    assert list(scenes.scenes(1, 5)) == list(scenes.scenes(1, 5)) != list(scenes.scenes(2, 5))


def test_the_readers_read_what_was_written(made, scenes):
    samples = {name: list(named(name).samples(made / "shown")) for name in BENCHMARKS}
    asked = [(question, answer(colour)) for colour in PICTURES[:TESTS] for question, answer in QUESTIONS.items()]
    for name, repeated in (("vqav2_val", 10), ("gqa", 1)):
        expected = [(question, (answer,) * repeated) for question, answer in asked]
        assert [(one.fields["question"], one.answers) for one in samples[name]] == expected
    closed = [(question, (answer,)) for question, answer in asked if answer in ("yes", "no")]
    assert [(one.fields["question"], one.answers) for one in samples["pope_random"]] == closed
    drawn = list(scenes.scenes(2, TESTS))
    told = [(sentence, thing.box) for scene in drawn for thing in scene.things for sentence in scene.sentences(thing)]
    assert [(one.fields["phrase"], one.box) for one in samples["refcoco_val"]] == told
    assert sorted(one.answers[-1] for one in samples["classes"]) == sorted(PICTURES[:TESTS])
    for sample in (each for of_one in samples.values() for each in of_one):
        with Image.open(sample.picture) as picture:
            assert picture.format == "JPEG"
            assert picture.size == ((scenes.SIDE,) * 2 if sample.box else (64, 64))


def test_blind_controls_ask_alike_about_other_pictures(made):
    def pixels(sample) -> np.ndarray:
        return np.asarray(Image.open(sample.picture).convert("RGB")).astype(int)

    for name in BENCHMARKS:
        shown, swapped, grey = (list(named(name).samples(made / one)) for one in ("shown", "swapped", "grey"))
        for one, other, none in zip(shown, swapped, grey, strict=True):
            assert one.id == other.id == none.id
            assert one.fields == other.fields == none.fields
            assert np.abs(pixels(one) - pixels(other)).max() > 100
            assert np.abs(pixels(none) - 128).max() < 3


def test_a_dialog_asks_for_boxes_of_its_scene_of_two(made, scenes):
    tokenizer = Tokenizer(made / "tokenizer.model")
    index = SampleIndex([made / "conversations"], "conversations")
    for sample, scene in enumerate(scenes.scenes(1, 12, least=2)):
        assert len(scene.things) == 2
        turns = tokenizer.decode(index.caption(sample).tolist()).split("Human: ")[1:]
        truth = {sentence: thing for thing in scene.things for sentence in scene.sentences(thing)}
        found = []
        for turn in turns:
            question, answer, *_ = (part.strip() for part in re.split("### Assistant:|###", turn))
            before, after = PROMPTS["locate"].split("{phrase}")
            assert len(tokenizer.encode(question)) < 1.5 * len(question.split()), "words are pieces"
            found.append(truth[question.removeprefix(before).removesuffix(after)])
            assert answer == format_box(found[-1].box, scenes.SIDE, scenes.SIDE, "centre")
        assert len(found) == 3


def test_the_table(run_example, made, scenes, tmp_path):
    """A model that reads the truth out of the files is right with its pictures; one that says one thing is not."""
    results, shown = tmp_path / "results", made / "shown"
    truth = {one.picture.read_bytes(): {} for name in BENCHMARKS for one in named(name).samples(shown)}
    for name in BENCHMARKS:
        for one in named(name).samples(shown):
            box = one.box and format_box(one.box, scenes.SIDE, scenes.SIDE, "centre")
            truth[one.picture.read_bytes()][named(name).prompts[Protocol.PAPER].format(**one.fields)] = (
                box or one.answers[0]
            )
    for control in ("shown", "grey"):
        double = Double(lambda messages, picture: truth.get(picture.content, {}).get(messages[-1].text, "no"))
        wanted = Wanted(made / control, Protocol.PAPER, Sampling())
        for model, names in {"vqa": BENCHMARKS[:3], "locate": BENCHMARKS[3:4], "classes": BENCHMARKS[4:]}.items():
            output = results / control / model
            told = agree(output, double, Path(model), wanted)
            for name in names:
                answer_benchmark(double, told, named(name), wanted, output)
            write_report(output, made / control, {name: named(name) for name in names})
    said = run_example("evaluate.py", results, "--data", made)
    rows = {(row["title"], row["figure"]): row["values"] for row in json.loads((results / "summary.json").read_text())}
    for (title, figure), values in rows.items():
        if figure != "yes ratio":
            assert values["shown"][1] == 100, title
    colours = [answer(colour) for colour in PICTURES[:TESTS] for answer in QUESTIONS.values()]
    says_no = 100 * sum(answer == "no" for answer in colours) / len(colours)
    assert rows["GQA", "accuracy"]["grey"] == [len(colours), pytest.approx(says_no)]
    assert rows["POPE (random)", "yes ratio"]["grey"][1] == 0
    counted = Counter(len(scene.things) for scene in scenes.scenes(2, TESTS))
    by_shapes = [title for title, _ in rows if title.startswith("scenes of")]
    assert by_shapes == [f"scenes of {count}" for count in sorted(counted)]
    assert said.splitlines()[0].split() == ["figure", "questions", "shown", "swapped", "grey"]
    assert len(said.splitlines()) == 1 + len(rows)
