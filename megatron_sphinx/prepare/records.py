"""What annotations of a picture are: records, and how a task reads their fields.

A record is a JSON object whose keys depend on the task (see `tasks.py`), with `image`, the path of the picture, and
where there are boxes its `width` and `height`. Boxes in records are left, top, right, bottom in pixels.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.boxes import format_box

# Source: accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory; the order is COCO's
KEY_POINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
_VISIBLE = 2  # of COCO's key points: 0 is not labelled, 1 is hidden

Record = Mapping[str, Any]


def text_of(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"no {key}: {value!r} is no text; give every annotation its {key}")
    return value.strip()


def image_of(record: Record) -> str | None:
    return text_of(record, "image") if "image" in record else None


def list_of(record: Record, key: str) -> list[Any]:
    values = record.get(key)
    if not isinstance(values, list) or not values:
        raise DataError(f"no {key}: {values!r} is no list of any; give every annotation its {key}")
    return values


def texts_of(record: Record, key: str) -> list[str]:
    return [text_of({key: value}, key) for value in list_of(record, key)]


def items_of(record: Record, key: str) -> list[Record]:
    values = list_of(record, key)
    if not all(isinstance(value, Mapping) for value in values):
        raise DataError(f"no {key}: {values!r} holds what is no JSON object; give each of {key} its keys")
    return values


def picture_size(record: Record) -> tuple[int, int]:
    """Width and height of a record's picture."""
    width, height = record.get("width"), record.get("height")
    if not all(isinstance(side, int) and side > 0 for side in (width, height)):
        raise DataError(f"no size of the picture: {width!r} x {height!r} is none; give width and height in pixels")
    return width, height  # type: ignore[return-value]


def box_text(item: Record, record: Record, padding: str) -> str:
    """The box of a part of a record, as text."""
    return format_box(item.get("box", ()), *picture_size(record), padding)


def object_text(record: Record, key: str, padding: str) -> str:
    """A named object of a record with its box, as text."""
    [item] = items_of({key: [record.get(key)]}, key)
    return text_of(item, "name") + box_text(item, record, padding)


def visible_points(person: Record) -> list[tuple[str, list[float]]]:
    """Names and places of a person's key points that are seen."""
    values = person.get("keypoints")
    if not isinstance(values, list) or len(values) != 3 * len(KEY_POINTS):
        raise DataError(f"no keypoints: {values!r} is not {len(KEY_POINTS)} times x, y, visibility; give them as COCO")
    if not all(isinstance(value, int | float) and isfinite(value) for value in values):
        raise DataError(f"keypoints that are no numbers: {values!r} holds something else; give finite numbers")
    return [(name, values[3 * n : 3 * n + 2]) for n, name in enumerate(KEY_POINTS) if values[3 * n + 2] == _VISIBLE]
