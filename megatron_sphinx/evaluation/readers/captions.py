"""Captions of pictures: COCO's form, which NoCaps has, and Karpathy's form of Flickr30k."""

from collections.abc import Iterator
from pathlib import Path

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.readers.rows import checked, first_there, located, rows_of
from megatron_sphinx.evaluation.samples import Sample


@checked
def read_captions(folder: Path, file: str, folders: tuple[str, ...], split: str = "") -> Iterator[Sample]:
    """Yield a sample for each picture, with all its captions as answers.

    Args:
        folder: that of the benchmark.
        file: in COCO's form, images and annotations, or Karpathy's, images with their sentences.
        folders: where pictures may be.
        split: of Karpathy's form, the one that is asked.

    Raises:
        DataError: the file is missing, has another layout, or pictures without captions.
    """
    source = located(folder, file)
    pictures = first_there(folder, folders)
    images = {row.formed("{number}"): row for row in rows_of(source, "images")}
    if all("sentences" in row.content for row in images.values()):
        for row in images.values():
            if row.filled("split") == split:
                told = tuple(row.within("sentences", each).filled("raw") for each in row.listed("sentences"))
                yield Sample(
                    id=row.filled("filename"),
                    picture=row.path("{filename}", pictures),
                    picture_id=row.filled("filename"),
                    fields={},
                    answers=told,
                )
        return
    captions: dict[str, list[str]] = {row.text("id"): [] for row in images.values()}
    for row in rows_of(source, "annotations"):
        if row.text("image_id") not in captions:
            raise row.fault(f"image_id {row.text('image_id')} is none of images")
        captions[row.text("image_id")].append(row.filled("caption"))
    for row in images.values():
        if not captions[row.text("id")]:
            raise DataError(f"{source}: {row.place}: the picture has no caption; give the file of a split that has")
        yield Sample(
            id=row.text("id"),
            picture=row.path("{file_name}", pictures),
            picture_id=row.text("id"),
            fields={},
            answers=tuple(captions[row.text("id")]),
            categories={"domain": row.text("domain")} if row.has("domain") else {},
            record={"image_id": row.content["id"]},
        )
