"""Records from files of COCO's form: captions, instances, key points, and phrases of regions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.boxes import clip_box, from_coco
from megatron_sphinx.prepare.records import Record, picture_size, visible_points

LeaveOut = Callable[[str], None]


@dataclass(frozen=True)
class Coco:
    """What a file of COCO's form has.

    Attributes:
        pictures: `image`, `width` and `height` of each, by id.
        names: of the categories, by id.
        annotations: in the order of the file.
    """

    pictures: Mapping[Any, Record]
    names: Mapping[Any, Any]
    annotations: Sequence[Record]


def read_coco(content: Record) -> Coco:
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
    """Each annotation with its picture."""
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
    """Each annotation with its picture, and its box as records have it."""
    for picture, annotation in _with_pictures(coco, leave_out):
        try:
            box = clip_box(from_coco(annotation.get("bbox", ())), *picture_size(picture))
        except DataError as error:
            leave_out(str(error))
        else:
            yield picture, {**annotation, "box": box}


def _grouped(found: Iterable[tuple[Record, Record]], key: str) -> Iterator[Record]:
    """Pictures, in the order in which they come, each with a list of all that was found in it."""
    groups: dict[Any, tuple[Record, list[Record]]] = {}
    for picture, item in found:
        groups.setdefault(picture["image"], (picture, []))[1].append(item)
    for picture, items in groups.values():
        yield {**picture, key: items}


def objects(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    def named() -> Iterator[tuple[Record, Record]]:
        for picture, item in _with_boxes(coco, leave_out):
            name = coco.names.get(_id(item, "category_id"))
            if isinstance(name, str) and name.strip():
                yield picture, {"name": name, "box": item["box"]}
            else:
                leave_out("unknown category id")

    return _grouped(named(), "objects")


def categories(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    for picture in objects(coco, leave_out):
        boxes: dict[str, list[Any]] = {}
        for item in picture["objects"]:
            boxes.setdefault(item["name"], []).append(item["box"])
        for name, of_name in boxes.items():
            yield {**picture, "name": name, "boxes": of_name}


def people(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
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
    for picture, item in _with_boxes(coco, leave_out):
        phrases = item.get("phrases")
        if not isinstance(phrases, list) or not phrases:
            leave_out("no phrases")
            continue
        for phrase in phrases:
            yield {**picture, "phrase": phrase, "box": item["box"]}


def captions(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    for picture, annotation in _with_pictures(coco, leave_out):
        yield {**picture, "caption": annotation.get("caption")}
