"""Make text ready to train on: a folder of Megatron's .bin and .idx, `[BOS] text [EOS]` a document.

    tools/prepare_text.py FILE... TARGET --tokenizer MODEL

Each line of a .jsonl (also .jsonl.zst, .jsonl.gz), each row of a .parquet, and each other file as a whole is a
document; a FILE may be a URL that fsspec knows. Give TARGET as data.text. What cannot be read is listed in
TARGET/quarantine.jsonl. Killed, the same command goes on where it was. Megatron's own .bin and .idx need nothing: give
their prefix as data.text.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.prepare.text import write_text


def main() -> int:
    """Run the tool; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece model")
    parser.add_argument("--key", default="content", help="key or column of the text (RefinedWeb: content)")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="to TARGET/held_out, by text")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    args = parser.parse_args()
    try:
        report = write_text(
            args.files, args.target, Tokenizer(args.tokenizer),
            key=args.key, held_out=args.held_out, workers=args.workers, show=True,
        )  # fmt: skip
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    held_out = f", {report.held_out} more held out" if args.held_out else ""
    print(f"{args.target}: {report.taken} documents, {report.tokens} tokens{held_out}")
    print(report.left_out(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
