"""Set-of-Mark data: numbered marks on the objects of images, for an annotator model that sees them.

The model that is trained sees the images as they are: its questions say in words which marks there would be, and where.

Source: SPHINX-X, arXiv:2402.05935, section 3.2; Set-of-Mark prompting, arXiv:2310.11441. The wording is ours.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_sphinx.data.images import decode
from megatron_sphinx.data.shuffle import key_of
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import inside, relative
from megatron_sphinx.prepare.boxes import Box, clip_box, from_coco
from megatron_sphinx.prepare.drawing import MOST_MARKS, Mark, Polygon, describe, draw_marks, place_of
from megatron_sphinx.prepare.tasks import ConversationJson, conversation
from megatron_sphinx.prepare.workers import Report, in_parallel, write_lines

QUESTIONS = (
    "Describe each marked object: what it is, how it looks and what it does.",
    "What is going on in the image? Explain it by the marked objects.",
    "How are the marked objects related to each other, in space and otherwise?",
)
REQUEST = "Call objects by their marks, such as mark 1. Answer in plain sentences, without headings or lists."
_MENTIONED = re.compile(r"\bmark\s+#?(\d+)|\bmarks\s+(#?\d+(?:(?:[\s,&#-]|and|or|to)+\d+)*)", re.IGNORECASE)

Entry = dict[str, Any]


def write_marks(
    annotations: Path,
    images: Path,
    target: Path,
    *,
    padding: str = "centre",
    most_marks: int = 10,
    follow_links: bool = False,
    workers: int = 1,
    show: bool = False,
) -> Report:
    """Write marked copies of images, and what an annotator model is asked about each.

    `target` gets `images/`, `prompts.jsonl` (id, image, marked, marks, description, question, prompt) and
    `quarantine.jsonl` with image, object and reason of what is left out.

    Args:
        annotations: JSON as COCO's instances: images, categories, and annotations with boxes and perhaps polygons.
        images: folder that the names of images are in, and must stay in.
        target: folder.
        padding: where an image is in its square, `centre` or `corner`.
        most_marks: on an image; the largest objects get them.
        follow_links: whether links in the folder of images may lead out of it.
        workers: processes at a time.
        show: whether to show progress.

    Returns:
        How many images are marked, and how many images and objects are not, by reason.

    Raises:
        DataError: the annotations cannot be read, or there is no object to mark.
    """
    if not 1 <= most_marks <= MOST_MARKS:
        raise DataError(f"most_marks={most_marks}: not so many can be told apart; give 1 to {MOST_MARKS}")
    pictures, quarantine = _read_annotations(annotations)
    (target / "images").mkdir(parents=True, exist_ok=True)
    read = partial(_read_image, images, follow_links=follow_links)
    work = partial(_mark_image, read=read, target=target, padding=padding, most_marks=most_marks)
    done = list(in_parallel(work, list(enumerate(pictures)), workers=workers, unit_name="image", show=show))
    report = Report(taken=sum(prompt is not None for prompt, _ in done))
    quarantine += [entry for _, left_out in done for entry in left_out]
    report.reject(quarantine)
    write_lines(target / "quarantine.jsonl", quarantine)
    if not report.taken:
        raise DataError(f"{annotations}: no object can be marked{report.why()}; see {target / 'quarantine.jsonl'}")
    write_lines(target / "prompts.jsonl", [prompt for prompt, _ in done if prompt])
    return report


def merge_answers(prompts: Path, answers: Path, target: Path) -> Report:
    """Join the answers of an annotator model to conversations about the images without marks.

    Args:
        prompts: the file that `write_marks` wrote.
        answers: JSON lines with id and answer, in any order; of several to one prompt the first good one is taken.
        target: file of conversations.

    Returns:
        How many answers are taken, and how many prompts and answers are not, by reason.

    Raises:
        DataError: a file cannot be read, or no answer can be used.
    """
    asked: dict[str, Entry] = {}
    for entry in _read_lines(prompts):
        keys = {"id", "image", "marks", "description", "question"}
        if entry is None or not entry.keys() >= keys or not isinstance(entry["image"], str):
            raise DataError(f"{prompts}: not all lines are prompts; make it by megatron-sphinx prepare som mark")
        asked[entry["id"]] = entry
    missing = set(asked)
    taken: dict[str, Entry] = {}
    report = Report()
    for entry in _read_lines(answers):
        key = str((entry or {}).get("id"))
        try:
            taken[key] = _merge(asked.get(key), entry, key in taken)
        except DataError as error:
            report.reject([{"reason": str(error)}])
        missing.discard(key)
    report.reject([{"reason": "missing answer"}] * len(missing))
    report.taken = len(taken)
    if not taken:
        raise DataError(f"{answers}: no answer can be used{report.why()}; give those to {prompts}, as id and answer")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_lines(target, [taken[key] for key in asked if key in taken])
    return report


def mentioned(text: str) -> set[int]:
    """Return the numbers of the marks that a text speaks of: `mark 1`, `marks 1, 2 and 3`."""
    return {int(number) for groups in _MENTIONED.findall(text) for number in re.findall(r"\d+", " ".join(groups))}


def _merge(asked: Entry | None, entry: Entry | None, is_taken: bool) -> ConversationJson:
    """Return the conversation that a prompt and its answer make.

    Args:
        asked: the prompt; None where no prompt has the answer's id.
        entry: the line with the answer; None where it is no JSON object.
        is_taken: whether another answer to the prompt has been taken.

    Raises:
        DataError: the answer cannot be used.
    """
    if entry is None or not entry.keys() >= {"id", "answer"}:
        raise DataError("no answer: a line is no object with id and answer")
    if asked is None:
        raise DataError(f"unknown id: {entry['id']}")
    if is_taken:
        raise DataError(f"second answer: {entry['id']}")
    answer = entry["answer"].strip() if isinstance(entry["answer"], str) else ""
    if not answer:
        raise DataError(f"empty answer: {entry['id']}")
    if unknown := mentioned(answer) - set(range(1, asked["marks"] + 1)):
        raise DataError(f"unknown mark: {min(unknown)} of {asked['marks']}")
    return conversation(relative(asked["image"]), [(f"{asked['description']}\n{asked['question']}", answer)])


@dataclass(frozen=True)
class _Picture:
    """An image as annotations have it.

    Attributes:
        key: its id, as text.
        name: of its file.
        objects: COCO's annotations of it, each with the `name` of its category.
    """

    key: str
    name: str
    objects: list[Entry]


def _read_annotations(path: Path) -> tuple[list[_Picture], list[Entry]]:
    """Return the images, and the quarantine's entries for objects that are in none of them."""
    quarantine = []
    try:
        content = json.loads(path.read_bytes())
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        pictures = {entry["id"]: _Picture(str(entry["id"]), str(entry["file_name"]), []) for entry in content["images"]}
        for entry in content["annotations"]:
            if entry["image_id"] in pictures:
                pictures[entry["image_id"]].objects.append(entry | {"name": names.get(entry["category_id"])})
            else:
                reason = f"unknown image: {entry['image_id']}"
                quarantine.append({"image": None, "object": entry.get("id"), "reason": reason})
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its path") from error
    except (ValueError, KeyError, TypeError) as error:
        fault = f"{type(error).__name__} {error}"
        raise DataError(
            f"{path}: not as COCO's instances are ({fault}); give images, annotations, categories"
        ) from error
    return list(pictures.values()), quarantine


def _read_image(images: Path, name: str, *, follow_links: bool) -> tuple[str, Image.Image]:
    """Return the normalised path of an image in its folder, and the image.

    Raises:
        DataError: the image is not in the folder, cannot be read, or does not decode.
    """
    path = inside(images, name, follow_links=follow_links)
    try:
        content = (images / path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    return path, decode(content)


def _mark_image(
    job: tuple[int, _Picture],
    *,
    read: Callable[[str], tuple[str, Image.Image]],
    target: Path,
    padding: str,
    most_marks: int,
) -> tuple[Entry | None, list[Entry]]:
    """Write the marked copy of an image.

    Args:
        job: number and annotations of the image.
        read: gives the path and the image for its name.
        target: folder.
        padding: where an image is in its square, `centre` or `corner`.
        most_marks: on an image.

    Returns:
        The prompt, or None where there is nothing to mark; and the quarantine's entries for what is left out.
    """
    number, picture = job
    quarantine: list[Entry] = []

    def leave_out(item: object, reason: str) -> None:
        quarantine.append({"image": picture.name, "object": item, "reason": reason})

    try:
        path, image = read(picture.name)
    except DataError as error:
        leave_out(None, str(error))
        return None, quarantine
    objects: list[tuple[str, Box, list[Polygon]]] = []
    for entry in picture.objects:
        try:
            objects.append(_object(entry, image.size))
        except DataError as error:
            leave_out(entry.get("id"), str(error))
    largest = sorted(range(len(objects)), key=lambda index: -_area(objects[index][1]))[:most_marks]
    if len(objects) > most_marks:
        leave_out(None, f"too many objects: {len(objects) - most_marks} smaller ones have no mark")
    if not objects:
        leave_out(None, "no object to mark")
        return None, quarantine
    marks = [
        Mark(count, name, box, polygons, place_of(box, polygons, image.size))
        for count, (name, box, polygons) in enumerate((objects[index] for index in sorted(largest)), 1)
    ]
    marked = Path("images") / f"{number:06d}.png"
    draw_marks(image, marks).save(target / marked)
    question = QUESTIONS[key_of("question", picture.key) % (len(QUESTIONS) if len(marks) > 1 else len(QUESTIONS) - 1)]
    prompt = {
        "id": picture.key,
        "image": path,
        "marked": str(marked),
        "marks": len(marks),
        "description": describe(marks, image.size, padding),
        "question": question,
        "prompt": f"{describe(marks)}\n{question} {REQUEST}",
    }
    return prompt, quarantine


def _object(entry: Entry, size: tuple[int, int]) -> tuple[str, Box, list[Polygon]]:
    """Return name, box and outline of an object, in pixels of an image of such a size.

    Raises:
        DataError: the object cannot be marked.
    """
    if not isinstance(entry["name"], str):
        raise DataError(f"unknown category: {entry['category_id']}")
    outline = entry.get("segmentation") or []
    if not isinstance(outline, list) or entry.get("iscrowd"):
        raise DataError("RLE mask: only boxes and polygons are drawn")
    polygons = []
    for flat in outline:
        try:
            x, y = np.array(flat, np.float64).reshape(-1, 2).T
        except (TypeError, ValueError) as error:
            raise DataError(f"not a polygon: {error}") from error
        if len(x) < 3 or not np.isfinite([x, y]).all():
            raise DataError(f"not a polygon: {len(x)} points, or one that is not finite")
        x, y = x.clip(0, size[0] - 1), y.clip(0, size[1] - 1)
        polygons.append(list(zip(x.tolist(), y.tolist(), strict=True)))
    return entry["name"], clip_box(from_coco(entry.get("bbox", ())), *size), polygons


def _area(box: Box) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def _read_lines(path: Path) -> Iterator[Entry | None]:
    """Yield the lines of a file that are JSON objects, and None for each other line."""
    try:
        with path.open("rb") as file:
            for line in filter(bytes.strip, file):
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = None
                yield entry if isinstance(entry, dict) else None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its path") from error
