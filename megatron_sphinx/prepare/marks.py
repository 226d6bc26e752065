"""Set-of-Mark data: numbered marks on the objects of images, for an annotator model that sees them.

The model that is trained sees the images as they are: its questions say in words which marks there would be, and where.

Source: SPHINX-X, arXiv:2402.05935, section 3.2; Set-of-Mark prompting, arXiv:2310.11441. The wording is ours.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_sphinx.data.images import decode
from megatron_sphinx.data.shuffle import key_of
from megatron_sphinx.errors import DataError
from megatron_sphinx.paths import inside
from megatron_sphinx.prepare.boxes import Box, clip_box, from_coco
from megatron_sphinx.prepare.coco import id_of, read_coco
from megatron_sphinx.prepare.drawing import MOST_MARKS, Mark, Polygon, describe, draw_marks, place_of
from megatron_sphinx.prepare.json_files import read_json
from megatron_sphinx.prepare.records import Record, picture_size
from megatron_sphinx.prepare.shards import file_content
from megatron_sphinx.prepare.texts import check_text
from megatron_sphinx.prepare.workers import (
    Report,
    check_workers,
    in_parallel,
    one_line,
    target_folder,
    write_lines,
)

QUESTIONS = (
    "Describe each marked object: what it is, how it looks and what it does.",
    "What is going on in the image? Explain it by the marked objects.",
    "How are the marked objects related to each other, in space and otherwise?",
)
REQUEST = "Call objects by their marks, such as mark 1. Answer in plain sentences, without headings or lists."


Entry = dict[str, Any]


@dataclass
class MarksReport(Report):
    """How many images and objects were marked, and how many were not.

    Attributes:
        objects: how many annotations there are.
        marked: how many of them have a mark.
        unmarked: how many of them the lines of the quarantine leave out.
    """

    objects: int = 0
    marked: int = 0
    unmarked: int = 0

    def balance(self, output: str, quarantine: str = "quarantine.jsonl") -> str:
        """Say that no image and no object was lost; the tool's last line.

        Raises:
            RuntimeError: the numbers do not add up, which is a fault of this package.
        """
        if self.objects != self.marked + self.unmarked:
            numbers = f"{self.objects} came in, {self.marked} + {self.unmarked} came out"
            raise RuntimeError(f"the numbers of objects do not add up: {numbers}; please report this")
        left = self.inputs - self.taken
        return (
            f"input {self.inputs} images with {self.objects} objects = {self.taken} {output} with {self.marked} + "
            f"{left} with the other {self.unmarked} in {quarantine}"
        )


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
) -> MarksReport:
    """Write marked copies of images, and what an annotator model is asked about each.

    `target` gets `images/`, `prompts.jsonl` (id, image, marked, marks, description, question, prompt) and
    `quarantine.jsonl` with image, object, reason, and how many objects are left out for it.

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
    check_workers(workers)
    pictures, quarantine, objects = _read_annotations(annotations)
    read = partial(_read_image, images, follow_links=follow_links)
    work = partial(_mark_image, read=read, target=target, padding=padding, most_marks=most_marks)
    with target_folder(target):
        (target / "images").mkdir(exist_ok=True)
        done = list(in_parallel(work, list(enumerate(pictures)), workers=workers, unit_name="image", show=show))
        prompts = [prompt for prompt, _ in done if prompt]
        quarantine += [entry for _, left_out in done for entry in left_out]
        report = MarksReport(inputs=len(pictures), taken=len(prompts), objects=objects)
        report.reject(quarantine)
        report.marked = sum(prompt["marks"] for prompt in prompts)
        report.unmarked = sum(entry["objects"] for entry in quarantine)
        write_lines(target / "quarantine.jsonl", quarantine)
        if not report.taken:
            raise DataError(f"{annotations}: no object can be marked{report.why()}; see {target / 'quarantine.jsonl'}")
        write_lines(target / "prompts.jsonl", prompts)
    return report


@dataclass(frozen=True)
class _Picture:
    """An image as annotations have it.

    Attributes:
        key: its id, as text.
        record: `image`, the name of its file, and `width` and `height`; None where its id stands for several.
        objects: COCO's annotations of it, each with the `name` of its category.
    """

    key: str
    record: Record | None
    objects: list[Entry]

    @property
    def name(self) -> str | None:
        """Name of its file; None where there is none."""
        name = (self.record or {}).get("image")
        return name if isinstance(name, str) else None


def _read_annotations(path: Path) -> tuple[list[_Picture], list[Entry], int]:
    """Return the images, the quarantine's entries for objects that are in none of them, and how many objects there are.

    Raises:
        DataError: the file cannot be read, or has another form.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise DataError(f"{path}: not as COCO's instances are; give images, annotations, categories")
    quarantine: list[Entry] = []

    def leave_out(reason: str, item: Any, objects: int = 0) -> None:
        number = item.get("id") if isinstance(item, dict) else None
        quarantine.append({"image": None, "object": number, "objects": objects, "reason": one_line(reason)})

    try:
        coco = read_coco(content, leave_out)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    texts = Counter(map(str, coco.pictures))  # 1 and "1" are two images, whose answers could not be told apart
    pictures = {
        key: _Picture(str(key), record if texts[str(key)] == 1 else None, []) for key, record in coco.pictures.items()
    }
    for entry in coco.annotations:
        picture = pictures.get(id_of(entry.get("image_id"))) if isinstance(entry, dict) else None
        if picture is None:
            named = f"unknown image: {str(entry.get('image_id'))[:80]}" if isinstance(entry, dict) else "no JSON object"
            leave_out(named, entry, 1)
        else:
            picture.objects.append(entry | {"name": coco.names.get(id_of(entry.get("category_id")))})
    return list(pictures.values()), quarantine, len(coco.annotations)


def _read_image(images: Path, picture: _Picture, *, follow_links: bool) -> tuple[str, Image.Image]:
    """Return the normalised path of an image in its folder, and the image.

    Raises:
        DataError: the image is not in the folder, cannot be read, does not decode, or is not of the size that its
            annotations were made for.
    """
    if picture.record is None:
        raise DataError(f"image id of several images: {picture.key}")
    if picture.name is None:
        raise DataError(f"image without file_name: {picture.key}")
    path = inside(images, picture.name, follow_links=follow_links)
    content, fault = file_content(images / path)
    if fault:
        raise DataError(f"cannot be read: {fault}")
    image = decode(content)
    _check_size(picture.record, image.size)
    return path, image


def _mark_image(
    job: tuple[int, _Picture],
    *,
    read: Callable[[_Picture], tuple[str, Image.Image]],
    target: Path,
    padding: str,
    most_marks: int,
) -> tuple[Entry | None, list[Entry]]:
    """Write the marked copy of an image.

    Args:
        job: number and annotations of the image.
        read: gives the path of the image, and the image.
        target: folder.
        padding: where an image is in its square, `centre` or `corner`.
        most_marks: on an image.

    Returns:
        The prompt, or None where there is nothing to mark; and the quarantine's entries for what is left out.
    """
    number, picture = job
    quarantine: list[Entry] = []

    def leave_out(item: object, reason: str, objects: int = 1) -> None:
        quarantine.append({"image": picture.name, "object": item, "objects": objects, "reason": one_line(reason)})

    try:
        path, image = read(picture)
    except DataError as error:
        leave_out(None, str(error), len(picture.objects))
        return None, quarantine
    objects: list[tuple[str, Box, list[Polygon]]] = []
    for entry in picture.objects:
        try:
            objects.append(_object(entry, image.size))
        except DataError as error:
            leave_out(entry.get("id"), str(error))
    largest = sorted(range(len(objects)), key=lambda index: -_area(objects[index][1]))[:most_marks]
    if (more := len(objects) - most_marks) > 0:
        leave_out(None, f"too many objects: {more} smaller ones have no mark", more)
    if not objects:
        leave_out(None, "no object to mark", 0)
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


def _check_size(record: Record, size: tuple[int, int]) -> None:
    """Raise DataError where annotations, whose boxes are in pixels, were made for an image of another size."""
    if record["width"] is None and record["height"] is None:
        return
    if (known := picture_size(record)) != size:
        shown = " and ".join(f"{width}x{height}" for width, height in (known, size))
        raise DataError(f"another size: {shown} pixels, of the annotations and of the upright image")


def _object(entry: Entry, size: tuple[int, int]) -> tuple[str, Box, list[Polygon]]:
    """Return name, box and outline of an object, in pixels of an image of such a size.

    Raises:
        DataError: the object cannot be marked.
    """
    if not isinstance(entry["name"], str):
        raise DataError(f"unknown category: {str(entry.get('category_id'))[:80]}")
    check_text(entry["name"], "name of a category")
    outline = entry.get("segmentation") or []
    if not isinstance(outline, list) or entry.get("iscrowd"):
        raise DataError("RLE mask: only boxes and polygons are drawn")
    polygons = []
    for flat in outline:
        try:
            x, y = np.array(flat, np.float64).reshape(-1, 2).T
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"not a polygon: {error}") from error
        if len(x) < 3 or not np.isfinite([x, y]).all():
            raise DataError(f"not a polygon: {len(x)} points, or one that is not finite")
        x, y = x.clip(0, size[0] - 1), y.clip(0, size[1] - 1)
        polygons.append(list(zip(x.tolist(), y.tolist(), strict=True)))
    return entry["name"], clip_box(from_coco(entry.get("bbox", ())), *size), polygons


def _area(box: Box) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)
