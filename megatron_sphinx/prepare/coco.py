"""Records from files of COCO's form: captions, instances, key points, and phrases of regions.

Each function makes the records of one kind of task; `leave_out` is told the reason for each annotation that cannot be
used.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.boxes import clip_box, from_coco
from megatron_sphinx.prepare.records import Record, picture_size, visible_points

LeaveOut = Callable[[str], None]


@dataclass(frozen=True)
class Coco:
    """The content of a file that has COCO's form.

    Attributes:
        pictures: `image`, `width` and `height` of each, by id.
        names: of the categories, by id.
        annotations: in the order of the file.
    """

    pictures: Mapping[Any, Record]
    names: Mapping[Any, Any]
    annotations: Sequence[Record]


def read_coco(content: Record) -> Coco:
    """Return the pictures, categories and annotations of a file of COCO's form.

    Raises:
        DataError: one of them is no list of JSON objects.
    """
    lists = {key: content.get(key, []) for key in ("images", "annotations", "categories")}
    for key, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
            raise DataError(f"{key}: no list of JSON objects; give a file of COCO's form")
    pictures = {
        _id(entry, "id"): {"image": entry.get("file_name"), "width": entry.get("width"), "height": entry.get("height")}
        for entry in lists["images"]
        if "id" in entry
    }
    return Coco(pictures, {_id(entry, "id"): entry.get("name") for entry in lists["categories"]}, lists["annotations"])


def _id(entry: Record, key: str) -> int | str | None:
    value = entry.get(key)
    return value if isinstance(value, int | str) else None


def _with_pictures(coco: Coco, leave_out: LeaveOut) -> Iterator[tuple[Record, Record]]:
    """Yield each annotation behind its picture."""
    for annotation in coco.annotations:
        picture = coco.pictures.get(_id(annotation, "image_id"))
        if picture is None:
            leave_out("unknown image id")
        elif not isinstance(picture["image"], str):
            leave_out("image without file_name")
        elif annotation.get("iscrowd"):
            leave_out("crowd")
        else:
            yield picture, annotation


def _with_boxes(coco: Coco, leave_out: LeaveOut) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Yield each annotation behind its picture; its `box` is left, top, right, bottom, as records have it."""
    for picture, annotation in _with_pictures(coco, leave_out):
        try:
            box = clip_box(from_coco(annotation.get("bbox", ())), *picture_size(picture))
        except DataError as error:
            leave_out(str(error))
        else:
            yield picture, {**annotation, "box": box}


def _grouped(pairs: Iterable[tuple[Record, Record]], key: str) -> Iterator[Record]:
    """Yield each picture once, with the list of all that was paired with it under a key."""
    groups: dict[Any, tuple[Record, list[Record]]] = {}
    for picture, item in pairs:
        groups.setdefault(picture["image"], (picture, []))[1].append(item)
    for picture, items in groups.values():
        yield {**picture, key: items}


def objects(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each picture, with all `objects` on it: name and box of each."""

    def named() -> Iterator[tuple[Record, Record]]:
        for picture, item in _with_boxes(coco, leave_out):
            name = coco.names.get(_id(item, "category_id"))
            if isinstance(name, str) and name.strip():
                yield picture, {"name": name, "box": item["box"]}
            else:
                leave_out("unknown category id")

    return _grouped(named(), "objects")


def categories(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each category on each picture: `name`, and the `boxes` of all its objects."""
    for picture in objects(coco, leave_out):
        boxes: dict[str, list[Any]] = {}
        for item in picture["objects"]:
            boxes.setdefault(item["name"], []).append(item["box"])
        for name, boxes_of_name in boxes.items():
            yield {**picture, "name": name, "boxes": boxes_of_name}


def people(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each picture, with all `people` on it: box and key points of each."""

    def posed() -> Iterator[tuple[Record, Record]]:
        for picture, person in _with_boxes(coco, leave_out):
            try:
                visible_points(person)
            except DataError as error:
                leave_out(str(error))
            else:
                yield picture, person

    return _grouped(posed(), "people")


def phrases(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each phrase of each region: `phrase` and `box`."""
    for picture, item in _with_boxes(coco, leave_out):
        texts = item.get("phrases")
        if not isinstance(texts, list) or not texts:
            leave_out("no phrases")
            continue
        for phrase in texts:
            yield {**picture, "phrase": phrase, "box": item["box"]}


def captions(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each caption of each picture."""
    for picture, annotation in _with_pictures(coco, leave_out):
        yield {**picture, "caption": annotation.get("caption")}
