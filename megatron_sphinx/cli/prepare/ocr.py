"""Make conversations about pages from PDFs: reading texts, and finding them.

    megatron-sphinx prepare ocr SOURCE... TARGET

SOURCE is a PDF, or a folder of them. TARGET gets images/<document>/<page>.png, conversations.jsonl (paths of images
are from TARGET) and quarantine.jsonl with document, page and reason of what is left out. What a dialog asks follows
from the names of document and page. Killed, the same command goes on where it was. TARGET/conversations.jsonl is a
source of `megatron-sphinx prepare conversations`.
"""

import argparse
from pathlib import Path

from megatron_sphinx.cli.command import add_workers

SETTINGS = ("pixels", "padding", "most_pages", "most_refused", "most_turns", "most_characters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments; what is not given is as DocumentSettings has it."""
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SOURCE")
    add("target", type=Path, metavar="TARGET")
    add("--pixels", type=int, help="longest side of a page's image")
    add("--padding", choices=("centre", "corner"), help="of pages to a square")
    add("--most-pages", type=int, help="of a document, from its first")
    refused = "of a page's texts that are not good Unicode; else the page is left out"
    add("--most-refused", type=float, metavar="SHARE", help=refused)
    add("--most-turns", type=int, help="questions of a dialog")
    add("--most-characters", type=int, help="of a page whose texts are asked for all at once")
    add("--follow-links", action="store_true", help="also take PDFs that links lead out of a folder to")
    add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.prepare.documents import find_documents, write_documents
    from megatron_sphinx.prepare.pdf import DocumentSettings

    settings = DocumentSettings(**{name: value for name in SETTINGS if (value := getattr(args, name)) is not None})
    documents = find_documents(args.sources, follow_links=args.follow_links)
    report = write_documents(documents, args.target, settings, workers=args.workers, show=True)
    print(f"{args.target}: {report.taken} pages of {len(documents)} documents")
    print(report.left_out(), end="")
    print(report.balance("pages"))
    return 0
