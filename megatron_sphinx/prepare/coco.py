"""Records from files of COCO's form: captions, instances, key points, and phrases of regions.

Each function makes the records of one kind of task; `leave_out` is told the reason for each annotation that cannot be
used. Ids match where they are equal numbers or equal texts: 1 and 1.0 are one id, and "1" is another. What has no id,
or one that stands for two things, is left out by name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.boxes import clip_box, from_coco
from megatron_sphinx.prepare.records import Record, picture_size, visible_points

ITEMS = "annotations of this record"  # key of what a record is made of; no key of a file
_MOST_EXACT = 2**53  # above it, floats are not all whole numbers

LeaveOut = Callable[[str, Any], None]  # told a reason, and what is left out


@dataclass(frozen=True)
class Coco:
    """The content of a file that has COCO's form.

    Attributes:
        pictures: `image`, `width` and `height` of each, by id; None where an id stands for several.
        names: of the categories, by id; None where an id stands for several.
        annotations: in the order of the file.
        unknown: how many pictures and categories have no id.
    """

    pictures: Mapping[Any, Record | None]
    names: Mapping[Any, Any]
    annotations: Sequence[Any]
    unknown: int


def read_coco(content: Record, leave_out: LeaveOut) -> Coco:
    """Return the pictures, categories and annotations of a file of COCO's form.

    Args:
        content: of the file.
        leave_out: told of pictures and categories that have no id.

    Raises:
        DataError: one of them is no list.
    """
    lists = {key: content.get(key, []) for key in ("images", "annotations", "categories")}
    for key, values in lists.items():
        if not isinstance(values, list):
            raise DataError(f"{key}: no list of JSON objects; give a file of COCO's form")
    tables: list[dict[Any, Any]] = []
    unknown = 0
    for key in ("images", "categories"):
        table: dict[Any, Any] = {}
        for entry in lists[key]:
            number = id_of(entry.get("id")) if isinstance(entry, Mapping) else None
            if number is None:
                unknown += 1
                leave_out(f"{key} without id: an entry has none that is a number or a text", entry)
                continue
            value = _picture_of(entry) if key == "images" else entry.get("name")
            table[number] = value if table.get(number, value) == value else None
        tables.append(table)
    return Coco(tables[0], tables[1], lists["annotations"], unknown)


def _picture_of(entry: Record) -> Record:
    return {"image": entry.get("file_name"), "width": entry.get("width"), "height": entry.get("height")}


def id_of(value: object) -> int | str | None:
    """Return an id so that equal ones are equal: a whole number or a text; None where it is neither."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) <= _MOST_EXACT else None
    return value


def inputs_of(coco: Coco, task: object) -> int:
    """Return how many annotations a file has for a function of this module; each phrase of a region is one."""
    sizes = (_phrases_in(entry) if task is phrases else 1 for entry in coco.annotations)
    return coco.unknown + sum(sizes)


def _phrases_in(annotation: object) -> int:
    """Return how many phrases an annotation has; 1 where it has none, since it is left out then."""
    texts = annotation.get("phrases") if isinstance(annotation, Mapping) else None
    return max(len(texts), 1) if isinstance(texts, list) else 1


def _with_pictures(coco: Coco, leave_out: LeaveOut) -> Iterator[tuple[Record, Record]]:
    """Yield each annotation behind its picture."""
    for annotation in coco.annotations:
        if not isinstance(annotation, Mapping):
            leave_out("no JSON object", annotation)
            continue
        number, is_crowd = id_of(annotation.get("image_id")), annotation.get("iscrowd")
        picture = coco.pictures.get(number)
        fault = ""
        if picture is None:
            fault = "image id of several images" if number in coco.pictures else "unknown image id"
        elif not isinstance(picture["image"], str):
            fault = "image without file_name"
        elif is_crowd not in (None, 0, 1):
            fault = f"iscrowd is neither 0 nor 1: {is_crowd!r}"
        elif is_crowd:
            fault = "crowd"
        if fault or picture is None:
            leave_out(fault, annotation)
        else:
            yield picture, annotation


def _with_boxes(coco: Coco, leave_out: LeaveOut) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Yield each annotation behind its picture; its `box` is left, top, right, bottom, as records have it."""
    for picture, annotation in _with_pictures(coco, leave_out):
        try:
            box = clip_box(from_coco(annotation.get("bbox", ())), *picture_size(picture))
        except DataError as error:
            leave_out(str(error), annotation)
        else:
            yield picture, {**annotation, "box": box}


def _grouped(pairs: Iterable[tuple[Record, Record, Any]], key: str) -> Iterator[Record]:
    """Yield each picture once, with the list of all that was paired with it under a key.

    Args:
        pairs: picture, what is paired with it, and the annotation that it comes from.
        key: of the list.
    """
    groups: dict[Any, tuple[Record, list[Record], list[Any]]] = {}
    for picture, item, annotation in pairs:
        _, items, annotations = groups.setdefault(picture["image"], (picture, [], []))
        items.append(item)
        annotations.append(annotation)
    for picture, items, annotations in groups.values():
        yield {**picture, key: items, ITEMS: annotations}


def objects(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each picture, with all `objects` on it: name and box of each."""

    def named() -> Iterator[tuple[Record, Record, Any]]:
        for picture, item in _with_boxes(coco, leave_out):
            number = id_of(item.get("category_id"))
            name = coco.names.get(number)
            if isinstance(name, str) and name.strip():
                yield picture, {"name": name, "box": item["box"]}, item
            elif number in coco.names and name is None:
                leave_out("category id of several categories, or of one without name", item)
            else:
                leave_out("unknown category id", item)

    return _grouped(named(), "objects")


def categories(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each category on each picture: `name`, and the `boxes` of all its objects."""
    for picture in objects(coco, leave_out):
        groups: dict[str, tuple[list[Any], list[Any]]] = {}
        for item, annotation in zip(picture["objects"], picture[ITEMS], strict=True):
            boxes, annotations = groups.setdefault(item["name"], ([], []))
            boxes.append(item["box"])
            annotations.append(annotation)
        for name, (boxes, annotations) in groups.items():
            yield {**picture, "name": name, "boxes": boxes, ITEMS: annotations}


def people(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each picture, with all `people` on it: box and key points of each."""

    def posed() -> Iterator[tuple[Record, Record, Any]]:
        for picture, person in _with_boxes(coco, leave_out):
            try:
                visible_points(person)
            except DataError as error:
                leave_out(str(error), person)
            else:
                yield picture, person, person

    return _grouped(posed(), "people")


def phrases(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each phrase of each region: `phrase` and `box`."""

    def leave_out_all(reason: str, annotation: Any) -> None:
        for _ in range(_phrases_in(annotation)):
            leave_out(reason, annotation)

    for picture, item in _with_boxes(coco, leave_out_all):
        texts = item.get("phrases")
        if not isinstance(texts, list) or not texts:
            leave_out("no phrases", item)
            continue
        for phrase in texts:
            yield {**picture, "phrase": phrase, "box": item["box"], ITEMS: [item]}


def captions(coco: Coco, leave_out: LeaveOut) -> Iterator[Record]:
    """Yield a record for each caption of each picture."""
    for picture, annotation in _with_pictures(coco, leave_out):
        yield {**picture, "caption": annotation.get("caption"), ITEMS: [annotation]}
