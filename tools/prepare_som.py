"""Make Set-of-Mark data: marks on the objects of images, shown to an annotator model; its answers as conversations.

    tools/prepare_som.py mark ANNOTATIONS IMAGES TARGET
    tools/prepare_som.py merge PROMPTS ANSWERS TARGET.jsonl

First, `mark` draws numbered marks on copies of the images. ANNOTATIONS are as COCO's instances: boxes, perhaps
polygons. TARGET gets images/, prompts.jsonl, and quarantine.jsonl with image, object and reason of what is left out.
Show each `marked` image of prompts.jsonl with its `prompt` to the annotator model, and write id and answer as JSON
lines. Then `merge` joins those to conversations about the images without marks, which the questions describe instead.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.prepare.drawing import MOST_MARKS
from megatron_sphinx.prepare.marks import merge_answers, write_marks


def main() -> int:
    """Run the tool; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    mark = commands.add_parser("mark", help="draw marks, write prompts")
    mark.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="JSON as COCO's instances")
    mark.add_argument("images", type=Path, metavar="IMAGES", help="folder of the images")
    mark.add_argument("target", type=Path, metavar="TARGET", help="folder")
    mark.add_argument("--padding", choices=("centre", "corner"), default="centre", help="of images to a square")
    mark.add_argument("--most-marks", type=int, default=10, help=f"on an image, at most {MOST_MARKS}: largest objects")
    mark.add_argument("--follow-links", action="store_true", help="also take images that links lead out of it to")
    mark.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    merge = commands.add_parser("merge", help="join answers to conversations")
    merge.add_argument("prompts", type=Path, metavar="PROMPTS", help="the prompts.jsonl of mark")
    merge.add_argument("answers", type=Path, metavar="ANSWERS", help="JSON lines with id and answer")
    merge.add_argument("target", type=Path, metavar="TARGET", help="file of conversations")
    args = parser.parse_args()
    try:
        if args.command == "mark":
            report = write_marks(
                args.annotations, args.images, args.target,
                padding=args.padding, most_marks=args.most_marks, follow_links=args.follow_links,
                workers=args.workers, show=True,
            )  # fmt: skip
        else:
            report = merge_answers(args.prompts, args.answers, args.target)
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{args.target}: {report.taken} {'images marked' if args.command == 'mark' else 'conversations'}")
    print(report.left_out(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
