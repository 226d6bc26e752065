"""Make conversations for instruction tuning from the annotations of a data set.

    tools/build_conversations.py TASK ANNOTATIONS TARGET.jsonl [--images FOLDER] [--padding centre|corner] [--turns N]

ANNOTATIONS is JSON, a list of objects, or JSON lines (.jsonl), one object a line; --help has the keys of each task.
Paths of images are relative to the folder of the run's images, boxes are [left, top, right, bottom] in pixels. Files of
COCO's form are used as they are: captions for caption, instances for detect and detect_category, person_keypoints for
pose, and for locate and describe any whose annotations have `phrases`, a list of texts. TARGET gets a conversation a
line, in the order of the annotations; the same command writes the same bytes. Annotations that cannot be used are
counted by reason.

Boxes are written in fractions of the padded square: give --padding as the model has it (vision.padding).
"""

import argparse
import json
import posixpath
import sys
from pathlib import Path

from megatron_sphinx.errors import DataError, SphinxError
from megatron_sphinx.prepare.tasks import TASKS, ConversationJson, build, merge
from megatron_sphinx.prepare.workers import Report, write_lines


def read(path: Path) -> object:
    """What a file of JSON, or of JSON lines, holds.

    Raises:
        DataError: it cannot be read, or is neither.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a file of annotations") from error
    if path.suffix != ".jsonl":
        return parse(content, str(path))
    lines = enumerate(content.splitlines(), 1)
    return [parse(line, f"{path} line {number}") for number, line in lines if line.strip()]


def parse(content: bytes, what: str) -> object:
    """What JSON holds.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{what}: not JSON ({error}); give a .json, or a .jsonl with one object a line") from error


def write(path: Path, conversations: list[ConversationJson]) -> None:
    """Write JSON lines under their final name when they are whole.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, conversations)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another TARGET") from error


def main() -> int:
    """Run the tool; the exit status."""
    keys = "\n".join(f"  {name:18}{task.keys}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"keys of each task:\n{keys}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help="one of those below")
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--images", default="", metavar="FOLDER", help="put before the path of each image")
    parser.add_argument("--padding", choices=("centre", "corner"), default="centre", help="default: centre")
    parser.add_argument(
        "--turns", type=int, default=1, metavar="N", help="join what is about the same image to dialogs of N questions"
    )
    args = parser.parse_args()
    report = Report()
    try:
        content = read(args.annotations)
        try:
            made = list(build(args.task, content, args.padding, lambda reason: report.reject([{"reason": reason}])))
        except DataError as error:
            raise DataError(f"{args.annotations}: {error}") from error
        if not made:
            raise DataError(f"{args.annotations}: holds no annotation that can be used for {args.task}{report.why()}")
        for one in made:
            if "image" in one:
                one["image"] = posixpath.join(args.images, one["image"])
        dialogs = merge(made, args.turns)
        write(args.target, dialogs)
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    questions = sum(len(one["conversations"]) // 2 for one in dialogs)
    text_only = sum("image" not in one for one in dialogs)
    of_text = f", {text_only} of text only" if text_only else ""
    print(f"{args.target}: {len(dialogs)} conversations, {questions} questions{of_text}")
    print(report.left_out(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
