"""Make conversations for instruction tuning from the annotations of a data set.

    megatron-sphinx prepare tasks TASK ANNOTATIONS TARGET.jsonl [--images FOLDER] [--padding centre|corner] [--turns N]

ANNOTATIONS is JSON, a list of objects, or JSON lines (.jsonl), one object a line; --help has the keys of each task.
Paths of images are relative to the folder of the run's images, boxes are [left, top, right, bottom] in pixels. Files of
COCO's form are used as they are: captions for caption, instances for detect and detect_category, person_keypoints for
pose, and for locate and describe any whose annotations have `phrases`, a list of texts. TARGET gets a conversation a
line, in the order of the annotations; the same command writes the same bytes. Annotations that cannot be used are
counted by reason.

Boxes are written in fractions of the padded square: give --padding as the model has it (vision.padding). TARGET is a
source of `megatron-sphinx prepare conversations`.
"""

import argparse
import json
import posixpath
from pathlib import Path

from megatron_sphinx.errors import DataError
from megatron_sphinx.prepare.tasks import TASKS, ConversationJson, build, merge


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
    from megatron_sphinx.prepare.workers import Report

    report = Report()
    annotations = _read(args.annotations)
    try:
        built = list(build(args.task, annotations, args.padding, lambda reason: report.reject([{"reason": reason}])))
    except DataError as error:
        raise DataError(f"{args.annotations}: {error}") from error
    if not built:
        raise DataError(f"{args.annotations}: holds no annotation that can be used for {args.task}{report.why()}")
    for conversation in built:
        if "image" in conversation:
            conversation["image"] = posixpath.join(args.images, conversation["image"])
    dialogs = merge(built, args.turns)
    _write(args.target, dialogs)
    questions = sum(len(dialog["conversations"]) // 2 for dialog in dialogs)
    text_only = sum("image" not in dialog for dialog in dialogs)
    of_text = f", {text_only} of text only" if text_only else ""
    print(f"{args.target}: {len(dialogs)} conversations, {questions} questions{of_text}")
    print(report.left_out(), end="")
    return 0


def _read(path: Path) -> object:
    """What a file of JSON, or of JSON lines, holds.

    Raises:
        DataError: it cannot be read, or is neither.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file of annotations") from error
    if path.suffix != ".jsonl":
        return _parse(content, str(path))
    lines = enumerate(content.splitlines(), 1)
    return [_parse(line, f"{path} line {number}") for number, line in lines if line.strip()]


def _parse(content: bytes, name: str) -> object:
    """What JSON holds; `name` begins the message where it is none.

    Raises:
        DataError: it is no JSON.
    """
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{name}: not JSON ({error}); give a .json, or a .jsonl with one object a line") from error


def _write(path: Path, conversations: list[ConversationJson]) -> None:
    """Write JSON lines under their final name when they are whole.

    Raises:
        DataError: the file cannot be written.
    """
    from megatron_sphinx.prepare.workers import write_lines

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, conversations)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another TARGET") from error
