"""Make Set-of-Mark data: marks on the objects of images, shown to an annotator model; its answers as conversations.

    megatron-sphinx prepare som mark ANNOTATIONS IMAGES TARGET
    megatron-sphinx prepare som merge PROMPTS ANSWERS TARGET.jsonl

First, `mark` draws numbered marks on copies of the images. ANNOTATIONS are as COCO's instances: boxes, perhaps
polygons. TARGET gets images/, prompts.jsonl, and quarantine.jsonl with image, object and reason of what is left out.
Show each `marked` image of prompts.jsonl with its `prompt` to the annotator model, and write id and answer as JSON
lines. Then `merge` joins those to conversations about the images without marks, which the questions describe instead.
"""

import argparse
from pathlib import Path

from megatron_sphinx.cli.command import add_workers

MOST_MARKS = 24  # as the marks have it, whose import takes long; a test holds both to be equal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    commands = parser.add_subparsers(dest="som", required=True, metavar="mark|merge")
    mark = commands.add_parser("mark", help="draw marks, write prompts")
    mark.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="JSON as COCO's instances")
    mark.add_argument("images", type=Path, metavar="IMAGES", help="folder of the images")
    mark.add_argument("target", type=Path, metavar="TARGET", help="folder")
    mark.add_argument("--padding", choices=("centre", "corner"), default="centre", help="of images to a square")
    mark.add_argument("--most-marks", type=int, default=10, help=f"on an image, at most {MOST_MARKS}: largest objects")
    mark.add_argument("--follow-links", action="store_true", help="also take images that links lead out of it to")
    add_workers(mark)
    merge = commands.add_parser("merge", help="join answers to conversations")
    merge.add_argument("prompts", type=Path, metavar="PROMPTS", help="the prompts.jsonl of mark")
    merge.add_argument("answers", type=Path, metavar="ANSWERS", help="JSON lines with id and answer")
    merge.add_argument("target", type=Path, metavar="TARGET", help="file of conversations")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.prepare.answers import merge_answers
    from megatron_sphinx.prepare.marks import write_marks
    from megatron_sphinx.prepare.workers import Report, quarantine_beside

    report: Report

    if args.som == "mark":
        report = write_marks(
            args.annotations, args.images, args.target,
            padding=args.padding, most_marks=args.most_marks, follow_links=args.follow_links,
            workers=args.workers, show=True,
        )  # fmt: skip
    else:
        report = merge_answers(args.prompts, args.answers, args.target)
    print(f"{args.target}: {report.taken} {'images marked' if args.som == 'mark' else 'conversations'}")
    print(report.left_out(), end="")
    if args.som == "mark":
        print(report.balance("marked"))
    else:
        print(report.balance("conversations", quarantine_beside(args.target).name))
    return 0
