"""Make text ready to train on: a folder of Megatron's .bin and .idx, `[BOS] text [EOS]` a document.

    megatron-sphinx prepare text FILE... TARGET --tokenizer MODEL

Each line of a .jsonl (also .jsonl.zst, .jsonl.gz), each row of a .parquet, and each other file as a whole is a
document; a FILE may be a URL that fsspec knows. Give TARGET as data.text. What cannot be read is listed in
TARGET/quarantine.jsonl. Killed, the same command goes on where it was. Megatron's own .bin and .idx need nothing: give
their prefix as data.text.
"""

import argparse
from pathlib import Path

from megatron_sphinx.cli.command import add_tokenizer, add_workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    add_tokenizer(parser)
    parser.add_argument("--key", default="content", help="key or column of the text (RefinedWeb: content)")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="to TARGET/held_out, by text")
    add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.data.tokenizer import Tokenizer
    from megatron_sphinx.prepare.text import write_text

    report = write_text(
        args.files, args.target, Tokenizer(args.tokenizer),
        key=args.key, held_out=args.held_out, workers=args.workers, show=True,
    )  # fmt: skip
    held_out = f", {report.held_out} more held out" if args.held_out else ""
    print(f"{args.target}: {report.taken} documents, {report.tokens} tokens{held_out}")
    print(report.left_out(), end="")
    return 0
