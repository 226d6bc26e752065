"""Make conversations for instruction tuning from the annotations of a data set.

    megatron-sphinx prepare tasks TASK ANNOTATIONS TARGET.jsonl [--images FOLDER] [--padding centre|corner] [--turns N]

ANNOTATIONS is JSON, a list of objects, or JSON lines (.jsonl), one object a line; --help has the keys of each task.
Paths of images are relative to the folder of the run's images, boxes are [left, top, right, bottom] in pixels. Files of
COCO's form are used as they are: captions for caption, instances for detect and detect_category, person_keypoints for
pose, and for locate and describe any whose annotations have `phrases`, a list of texts. TARGET gets a conversation a
line, in the order of the annotations; the same command writes the same bytes. Annotations that cannot be used are
listed in TARGET.quarantine.jsonl.

For classify ANNOTATIONS may be a folder of classes instead: a folder of pictures for each class, called as the class
is, or by its synset where all are of ImageNet-1K; paths of images are relative to it.

Boxes are written in fractions of the padded square: give --padding as the model has it (vision.padding). TARGET is a
source of `megatron-sphinx prepare conversations`.
"""

import argparse
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.json_files import Item, read_items_or_object
from megatron_sphinx.prepare.tasks import TASKS, Built, build, merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.epilog = "keys of each task:\n" + "\n".join(f"  {name:18}{task.keys}" for name, task in TASKS.items())
    parser.add_argument("task", choices=tuple(TASKS), metavar="TASK", help="one of those below")
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--images", default="", metavar="FOLDER", help="put before the path of each image")
    parser.add_argument("--padding", choices=("centre", "corner"), default="centre", help="default: centre")
    parser.add_argument(
        "--turns", type=int, default=1, metavar="N", help="join what is about the same image to dialogs of N questions"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.prepare.workers import Report, one_line, quarantine_beside

    if args.turns < 1:
        raise DataError(f"turns={args.turns}: must be 1 or more; leave --turns out for a question a conversation")
    quarantine: list[dict[str, Any]] = []

    def leave_out(reason: str, source: Any) -> None:
        name = {"annotations": str(args.annotations), **name_of(source)}
        quarantine.append(name | {"reason": one_line(reason)})

    report, counts = Report(), Built()
    annotations = _annotations(args.task, args.annotations)
    try:
        built = list(build(args.task, annotations, args.padding, leave_out, counts))
    except DataError as error:
        raise DataError(f"{args.annotations}: {error}") from error
    report.inputs, report.taken = counts.inputs, counts.taken
    report.reject(quarantine)
    if not built:
        raise DataError(f"{args.annotations}: holds no annotation that can be used for {args.task}{report.why()}")
    for conversation in built:
        if "image" in conversation:
            conversation["image"] = posixpath.join(args.images, conversation["image"])
    dialogs = merge(built, args.turns)
    _write(args.target, dialogs)
    _write(quarantine_beside(args.target), quarantine)
    questions = sum(len(dialog["conversations"]) // 2 for dialog in dialogs)
    text_only = sum("image" not in dialog for dialog in dialogs)
    of_text = f", {text_only} of text only" if text_only else ""
    print(f"{args.target}: {len(dialogs)} conversations, {questions} questions{of_text}")
    print(report.left_out(), end="")
    print(report.balance("annotations", quarantine_beside(args.target).name))
    return 0


def _annotations(task: str, source: Path) -> Any:
    """Return the annotations in a file, or of the pictures in a folder of classes."""
    if task != "classify" or not source.is_dir():
        return read_items_or_object(source)
    from megatron_sphinx.prepare.classes import read_classes

    return [{"image": one.path, "class": one.name} for one in read_classes(source)]


def name_of(source: Any) -> dict[str, Any]:
    """Name an annotation in the quarantine: by its place in a file, or by its id and its image's."""
    if isinstance(source, Item):
        return {"place": source.place}
    if isinstance(source, Mapping):
        return {key: source[key] for key in ("id", "image_id", "image", "file_name") if key in source}
    return {"content": repr(source)[:80]}


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write JSON lines under their final name when they are whole.

    Raises:
        DataError: the file cannot be written.
    """
    from megatron_sphinx.prepare.workers import write_lines

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, entries)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another TARGET") from error
