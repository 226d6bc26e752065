"""What annotations of a picture are: records, and how a task reads their fields.

A record is a JSON object whose keys depend on the task (see `tasks.py`), with `image`, the path of the picture, and
where there are boxes its `width` and `height`. Boxes in records are left, top, right, bottom in pixels.
"""

from collections.abc import Mapping
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.boxes import format_box, is_finite
from megatron_sphinx.prepare.texts import check_text

# Source: accessory/demos/multi_turn_mm_box.py of LLaMA2-Accessory; the order is COCO's
KEY_POINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
_MOST_SHOWN = 80  # characters of what cannot be used
_VISIBLE = 2  # of COCO's key points: 0 is not labelled, 1 is hidden

Record = Mapping[str, Any]


def text_of(record: Record, key: str) -> str:
    """Return the text under a key, without spaces around it.

    Raises:
        DataError: there is none, or one that is not Unicode.
    """
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"no {key}: {_shown(value)} is no text; give every annotation its {key}")
    if key != "image":  # `paths` says what a path may be
        check_text(value, key)
    return value.strip()


def image_of(record: Record) -> str | None:
    """Return the path of a record's picture; None where the record is about text only."""
    return text_of(record, "image") if "image" in record else None


def list_of(record: Record, key: str) -> list[Any]:
    """Return the list under a key.

    Raises:
        DataError: there is none, or it is empty.
    """
    values = record.get(key)
    if not isinstance(values, list) or not values:
        raise DataError(f"no {key}: {_shown(values)} is no list of any; give every annotation its {key}")
    return values


def texts_of(record: Record, key: str) -> list[str]:
    """Return the list of texts under a key; raise DataError where there is none, or one of them is no text."""
    return [text_of({key: value}, key) for value in list_of(record, key)]


def items_of(record: Record, key: str) -> list[Record]:
    """Return the list of JSON objects under a key; raise DataError where there is none, or one of them is no object."""
    values = list_of(record, key)
    if not all(isinstance(value, Mapping) for value in values):
        raise DataError(f"no {key}: {_shown(values)} holds what is no JSON object; give each of {key} its keys")
    return values


def picture_size(record: Record) -> tuple[int, int]:
    """Return width and height of a record's picture in pixels; raise DataError where they are not given."""
    width, height = record.get("width"), record.get("height")
    sides = [int(side) for side in (width, height) if is_finite(side) and side >= 1 and side == int(side)]
    if len(sides) != 2:
        fault = f"{_shown(width)} x {_shown(height)} is none"
        raise DataError(f"no size of the picture: {fault}; give width and height in whole pixels")
    return sides[0], sides[1]


def box_text(item: Record, record: Record, padding: str) -> str:
    """Return the box of a part of a record as text.

    Args:
        item: the part of the record that has the box; it may be the record itself.
        record: with the size of the picture.
        padding: where pictures are in their squares, `centre` or `corner`.
    """
    return format_box(item.get("box", ()), *picture_size(record), padding)


def object_of(record: Record, key: str) -> Record:
    """Return the JSON object under a key of a record; raise DataError where there is none."""
    [item] = items_of({key: [record.get(key)]}, key)
    return item


def visible_points(person: Record) -> list[tuple[str, list[float]]]:
    """Return names and places of those of a person's key points that can be seen.

    Raises:
        DataError: `keypoints` is not what COCO has there.
    """
    values = person.get("keypoints")
    if not isinstance(values, list) or len(values) != 3 * len(KEY_POINTS):
        raise DataError(
            f"no keypoints: {_shown(values)} is not {len(KEY_POINTS)} times x, y, visibility; give them as COCO"
        )
    if not all(map(is_finite, values)):
        raise DataError(f"keypoints that are no numbers: {_shown(values)} holds something else; give finite numbers")
    return [(name, values[3 * n : 3 * n + 2]) for n, name in enumerate(KEY_POINTS) if values[3 * n + 2] == _VISIBLE]


def _shown(value: object) -> str:
    """Return the beginning of what stands where something else should, for a message."""
    return repr(value)[:_MOST_SHOWN]
