"""Regions that a sentence describes: RefCOCO, RefCOCO+ and RefCOCOg as their toolkit has them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.evaluation.readers.rows import Row, checked, first_there, located, rows_of
from megatron_sphinx.evaluation.samples import Sample
from megatron_sphinx.prepare.boxes import from_coco, is_finite

_PICTURES = ("train2014", "images/train2014", "../coco/train2014")


@checked
def read_references(folder: Path, references: str, split: str) -> Iterator[Sample]:
    """Yield the samples of a split, one for each sentence.

    Args:
        folder: that of the benchmark, such as refcoco.
        references: the pickled file of references, such as refs(unc).p.
        split: val, testA, testB or test.

    Raises:
        DataError: a file is missing, has another layout, or names no box.
    """
    from megatron_sphinx.unpickling import plain_pickle

    source = located(folder, references)
    if not source.is_file():
        raise DataError(f"{source}: is missing; give the file as its authors distribute it")
    content = plain_pickle(source)
    if not isinstance(content, list):
        raise DataError(f"{source}: holds no list of references; give the file as its authors distribute it")
    chosen = [row for row in _rows(source, content) if row.filled("split") == split]
    if not chosen:
        known = ", ".join(sorted({str(row.content.get("split")) for row in _rows(source, content)}))
        raise DataError(f"{source}: has no references of the split {split}; it has {shortened(known)}")
    instances = located(folder, "instances.json")
    boxes = _boxes(instances, {row.text("ann_id") for row in chosen})
    images = {row.text("id"): row for row in rows_of(instances, "images")}
    pictures = first_there(folder, _PICTURES)
    for row in chosen:
        image = row.text("image_id")
        if image not in images:
            raise row.fault(f"image_id {image} is not in {instances.name}")
        if row.text("ann_id") not in boxes:
            raise row.fault(f"ann_id {row.text('ann_id')} is not in {instances.name}")
        for sentence in row.listed("sentences"):
            told = row.within("sentences", sentence)
            yield Sample(
                id=told.text("sent_id"),
                picture=images[image].path("{file_name}", pictures),
                picture_id=image,
                fields={"phrase": told.text("sent")},
                box=boxes[row.text("ann_id")],
                record={name: row.content.get(name) for name in ("ref_id", "ann_id", "category_id")},
            )


def _rows(source: Path, content: list[Any]) -> Iterator[Row]:
    for number, value in enumerate(content):
        if not isinstance(value, dict):
            raise DataError(f"{source}: item {number + 1}: {shortened(value, 80)!r} is no reference")
        yield Row(source, f"item {number + 1}", number, "", value)


def _boxes(instances: Path, wanted: set[str]) -> dict[str, tuple[float, float, float, float]]:
    """Return the boxes of annotations as left, top, right, bottom in pixels; COCO has left, top, width, height."""
    found = {}
    for row in rows_of(instances, "annotations"):
        if (name := row.text("id")) in wanted:
            found[name] = corners(row, "bbox")
    return found


def corners(row: Row, field: str) -> tuple[float, float, float, float]:
    """Return a box of a row, which it has as left, top, width, height, as left, top, right, bottom.

    Raises:
        DataError: it has none.
    """
    box = row.listed(field)
    if len(box) != 4 or not all(is_finite(side) for side in box) or box[2] <= 0 or box[3] <= 0:
        raise row.fault(f"no {field}: {shortened(box, 80)} is not left, top, width, height in pixels")
    return from_coco(box)
