"""Make conversations about pages from PDFs: reading texts, and finding them.

    tools/prepare_ocr.py SOURCE... TARGET

SOURCE is a PDF, or a folder of them. TARGET gets images/<document>/<page>.png, conversations.jsonl (paths of images
are from TARGET) and quarantine.jsonl with document, page and reason of what is left out. What a dialog asks follows
from the names of document and page. Killed, the same command goes on where it was.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.prepare.documents import find_documents, write_documents
from megatron_sphinx.prepare.pdf import DocumentSettings as Settings


def main() -> int:
    """Run the tool; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--pixels", type=int, default=Settings.pixels, help="longest side of a page's image")
    parser.add_argument(
        "--padding", choices=("centre", "corner"), default=Settings.padding, help="of pages to a square"
    )
    parser.add_argument("--most-pages", type=int, default=Settings.most_pages, help="of a document, from its first")
    parser.add_argument(
        "--most-refused", type=float, default=Settings.most_refused, metavar="SHARE",
        help="of a page's texts that are not good Unicode; else the page is left out",
    )  # fmt: skip
    parser.add_argument("--most-turns", type=int, default=Settings.most_turns, help="questions of a dialog")
    parser.add_argument(
        "--most-characters", type=int, default=Settings.most_characters,
        help="of a page whose texts are asked for all at once",
    )  # fmt: skip
    parser.add_argument("--follow-links", action="store_true", help="also take PDFs that links lead out of a folder to")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    args = parser.parse_args()
    try:
        settings = Settings(
            args.pixels, args.padding, args.most_pages, args.most_refused, args.most_turns, args.most_characters
        )
        documents = find_documents(args.sources, follow_links=args.follow_links)
        report = write_documents(documents, args.target, settings, workers=args.workers, show=True)
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{args.target}: {report.taken} pages of {len(documents)} documents")
    print(report.left_out(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
