"""Make benchmarks in the layouts of their authors, and what a model is tuned on to find boxes.

    examples/evaluate_data.py [FOLDER]

Writes into FOLDER (data/evaluate), from what examples/vqa_data.py and examples/classes_data.py have made, and from
scenes that are drawn:

* conversations/: of each training scene a dialog that asks for the boxes of its shapes; tokenizer.model, trained on
  these dialogs;
* shown/: folders as `megatron-sphinx evaluate --data` takes them: vqav2, gqa and pope with easy-VQA's test questions,
  refcoco with scenes that training never sees, classes with Fashion-MNIST's test pictures, and the pictures of vqav2
  and pope in coco;
* swapped/ and grey/: the blind controls: for each question the picture is that of another one, or all grey.

Does nothing where that is all there.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scenes import SHAPES, SIDE, Scene, scenes
from vqa_data import train_tokenizer

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.prepare import tasks
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.tasks import ConversationJson
from megatron_sphinx.tensors.pickle_writer import dumps

Question = dict[str, str]  # image, question, answer
Pictures = Sequence[Image.Image]

TRAINING_SEED, TEST_SEED = 1, 2
TURNS = 3  # of a dialog about a scene
PEOPLE = 10  # who answered a question of VQA
GREY = (128, 128, 128)
CONTROLS: dict[str, Callable[[Pictures], Pictures]] = {
    "shown": lambda pictures: pictures,
    "swapped": lambda pictures: [*pictures[1:], *pictures[:1]],
    "grey": lambda pictures: [Image.new("RGB", picture.size, GREY) for picture in pictures],
}


def dialogs(drawn: Sequence[Scene], rng: np.random.Generator) -> Iterator[ConversationJson]:
    """Make of each scene one dialog: TURNS times, a shape drawn anew, one of its sentences, and its box.

    A shape may be asked for again, so that what was asked before does not tell which one is left.

    Args:
        drawn: the scenes; the picture of each is called after its number.
        rng: draws sentences and order.
    """
    for number, scene in enumerate(drawn):
        picture = {"image": f"{number}.png", "width": SIDE, "height": SIDE}
        turns = []
        for place in rng.integers(0, len(scene.things), TURNS):
            thing = scene.things[place]
            phrase = str(rng.choice(scene.sentences(thing)))
            turns.append(tasks.locate({**picture, "phrase": phrase, "box": list(thing.box)}, "centre"))
        yield from tasks.merge(turns, len(turns))


def write_training(folder: Path, count: int) -> int:
    """Write a tokenizer, and the index of dialogs about so many scenes of two shapes; return how many there are.

    Who tells two shapes apart finds a lone one, but not the other way round: so no scene of one is trained on.
    """
    drawn = list(scenes(TRAINING_SEED, count, least=2))
    asked = list(dialogs(drawn, np.random.default_rng(TRAINING_SEED)))
    tokenizer = folder / "tokenizer.model"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_bytes(train_tokenizer(asked))
    with tempfile.TemporaryDirectory() as name:
        for number, scene in enumerate(drawn):
            scene.picture().save(Path(name) / f"{number}.png")
        source = Path(name) / "dialogs.json"
        source.write_text(json.dumps(asked))
        return index_conversations([source], folder / "conversations", Tokenizer(tokenizer)).taken


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_pictures(folder: Path, pictures: Pictures, name: str) -> None:
    """Write pictures as JPEG of high quality.

    Args:
        folder: that they come into.
        pictures: in the order of their numbers.
        name: of a file, with {number} in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / name.format(number=number), "JPEG", quality=95, subsampling=0)


def is_closed(question: Question) -> bool:
    """Say whether a question is answered by yes or no."""
    return question["answer"] in ("yes", "no")


def write_vqav2(folder: Path, asked: Sequence[Sequence[Question]]) -> None:
    """Write questions and the answers of ten people, who agree, as visualqa.org has them.

    Args:
        folder: of the benchmark.
        asked: the questions about each picture, in the order of the pictures' numbers.
    """
    questions, annotations = [], []
    for image, of_picture in enumerate(asked):
        for question in of_picture:
            answer, ids = question["answer"], {"image_id": image, "question_id": len(questions)}
            given = [{"answer": answer, "answer_confidence": "yes", "answer_id": 1 + n} for n in range(PEOPLE)]
            kind = {
                "question_type": " ".join(question["question"].split()[:2]),
                "answer_type": "yes/no" if is_closed(question) else "other",
            }
            questions.append({**ids, "question": question["question"]})
            annotations.append({**ids, **kind, "multiple_choice_answer": answer, "answers": given})
    subset = {"data_type": "mscoco", "data_subtype": "val2014", "info": {}, "license": {}}
    names = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
    write_json(folder / names[0], {**subset, "task_type": "Open-Ended", "questions": questions})
    write_json(folder / names[1], {**subset, "annotations": annotations})


def write_gqa(folder: Path, asked: Sequence[Sequence[Question]]) -> None:
    """Write questions as GQA has them: one object, each by its id; arguments are those of `write_vqav2`."""
    rows = {}
    for image, of_picture in enumerate(asked):
        for question in of_picture:
            types = {"structural": "verify" if is_closed(question) else "query", "semantic": "attr", "detailed": ""}
            rows[f"{len(rows):08d}"] = {
                "imageId": str(image),
                "question": question["question"],
                "answer": question["answer"],
                "isBalanced": True,
                "types": types,
            }
    write_json(folder / "testdev_balanced_questions.json", rows)


def write_pope(folder: Path, asked: Sequence[Sequence[Question]]) -> None:
    """Write the questions that are answered by yes or no as POPE's random split; arguments as of `write_vqav2`."""
    rows: list[dict[str, Any]] = []
    for image, of_picture in enumerate(asked):
        for question in filter(is_closed, of_picture):
            place = {"question_id": len(rows) + 1, "image": coco_name("val").format(number=image)}
            rows.append({**place, "text": question["question"], "label": question["answer"]})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "coco_pope_random.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def coco_name(split: str) -> str:
    """Return the name of COCO's pictures of train or val in 2014, with {number} in it."""
    return f"COCO_{split}2014_{{number:012d}}.jpg"


def write_refcoco(folder: Path, drawn: Sequence[Scene]) -> None:
    """Write scenes as the validation split of RefCOCO: pickled references, and COCO's file of boxes."""
    references: list[dict[str, Any]] = []
    images, annotations, sentences = [], [], 0
    for image, scene in enumerate(drawn):
        name = coco_name("train").format(number=image)
        images.append({"id": image, "file_name": name, "width": SIDE, "height": SIDE})
        for thing in scene.things:
            left, top, right, bottom = thing.box
            category, number = SHAPES.index(thing.shape) + 1, len(annotations)
            ids = {"image_id": image, "category_id": category}
            size = right - left, bottom - top
            box = {"bbox": [left, top, *size], "area": size[0] * size[1], "iscrowd": 0}
            annotations.append({"id": number, **ids, **box})
            said = [
                {"sent_id": sentences + place, "sent": sent, "raw": sent, "tokens": sent.split()}
                for place, sent in enumerate(scene.sentences(thing))
            ]
            sentences += len(said)
            told = {"sentences": said, "sent_ids": [sentence["sent_id"] for sentence in said]}
            references.append({"ref_id": number, "ann_id": number, **ids, "file_name": name, "split": "val", **told})
    categories = [{"id": 1 + number, "name": shape} for number, shape in enumerate(SHAPES)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "instances.json", content)
    (folder / "refs(unc).p").write_bytes(dumps(references))


def write_benchmarks(folder: Path, test: Path, pictures: int, drawn: Sequence[Scene]) -> int:
    """Write the benchmarks and their blind controls; count the questions of easy-VQA.

    Args:
        folder: gets one for each of CONTROLS.
        test: what examples/vqa_data.py has made for the test.
        pictures: of easy-VQA, at most.
        drawn: scenes that training never sees.
    """
    lines = [json.loads(line) for line in (test / "questions.jsonl").read_text().splitlines()]
    groups = groupby(lines, lambda question: question["image"])
    asked = [list(questions) for _, questions in islice(groups, pictures)]
    shapes = [Image.open(test / "images" / questions[0]["image"]).convert("RGB") for questions in asked]
    for control, changed in CONTROLS.items():
        data = folder / control
        write_vqav2(data / "vqav2", asked)
        write_gqa(data / "gqa", asked)
        write_pope(data / "pope", asked)
        write_refcoco(data / "refcoco", drawn)
        write_pictures(data / "coco" / "val2014", changed(shapes), coco_name("val"))
        write_pictures(data / "gqa" / "images", changed(shapes), "{number}.jpg")
        write_pictures(data / "refcoco" / "train2014", changed([each.picture() for each in drawn]), coco_name("train"))
    return sum(map(len, asked))


def write_classes(folder: Path, test: Path, count: int) -> None:
    """Write test pictures of clothes, and their blind controls, as folders of classes.

    Args:
        folder: gets one for each of CONTROLS.
        test: has the folder `classes`, as examples/classes_data.py leaves it.
        count: of pictures, at most; the first ones by their numbers, which mix the classes.
    """
    files = sorted(test.glob("classes/*/*.jpg"), key=lambda file: file.name)[:count]
    pictures = [Image.open(file).convert("RGB") for file in files]
    for control, changed in CONTROLS.items():
        for file, picture in zip(files, changed(pictures), strict=True):
            write_pictures(folder / control / "classes" / file.parent.name, [picture], file.name)


def main() -> int:
    """Make the data; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/evaluate"))
    parser.add_argument("--vqa", type=Path, default=Path("data/vqa"), help="what examples/vqa_data.py has made")
    parser.add_argument("--classes", type=Path, default=Path("data/classes"), help="that of examples/classes_data.py")
    parser.add_argument("--scenes", type=int, default=48_000, help="that are trained on")
    parser.add_argument("--tests", type=int, default=250, help="pictures of each kind that are asked about")
    args = parser.parse_args()
    done = args.folder / "prepared.txt"
    if not done.is_file():
        made = write_training(args.folder, args.scenes)
        drawn = list(scenes(TEST_SEED, args.tests))
        questions = write_benchmarks(args.folder, args.vqa / "test", args.tests, drawn)
        write_classes(args.folder, args.classes / "test", args.tests)
        boxes = sum(len(scene.sentences(thing)) for scene in drawn for thing in scene.things)
        done.write_text(f"{made} dialogs about scenes; tests: {questions} questions, {boxes} sentences\n")
    print(f"{args.folder}: {done.read_text()}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
