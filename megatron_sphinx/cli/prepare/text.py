"""Make text ready to train on: a folder of Megatron's .bin and .idx, `[BOS] text [EOS]` a document.

    megatron-sphinx prepare text FILE... TARGET --tokenizer MODEL

FILE holds JSON (a line, an element of an array, or an object by itself a document), parquet (a row a document), or is
one document itself (.txt, .md, .rst, .tex); each may be compressed by gzip, bzip2, xz, zstd or lz4, and be a URL that
fsspec knows.

--key, --encoding and --format hold for all files, or as PATTERN=VALUE for those whose path or name is like a pattern:

    --key text --key 'refinedweb*=content' --encoding '*.txt=latin-1'

Give TARGET as data.text. What cannot be used is listed in TARGET/quarantine.jsonl with its place, and the last line
says that input = output + quarantine. Killed, the same command goes on where it was. Megatron's own .bin and .idx need
nothing: give their prefix as data.text.
"""

import argparse
from pathlib import Path

from megatron_sphinx.cli.command import add_tokenizer, add_workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    add_tokenizer(parser)
    key = "key or column of the text; of several the first that a file has; default: content or text"
    parser.add_argument("--key", action="append", default=[], metavar="[PATTERN=]KEY", help=key)
    encoding = "of files that are not UTF-8 and do not say what they are, such as latin-1"
    parser.add_argument("--encoding", action="append", default=[], metavar="[PATTERN=]NAME", help=encoding)
    form = "text, json or parquet, of files whose name and content do not tell; text: a file is a document"
    parser.add_argument("--format", action="append", default=[], metavar="[PATTERN=]NAME", help=form)
    most = "of a document; a longer one is left out, without being held in memory; default: 8,388,608"
    parser.add_argument("--most-characters", type=int, default=2**23, metavar="N", help=most)
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="to TARGET/held_out, by text")
    add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.data.tokenizer import Tokenizer
    from megatron_sphinx.prepare.text import write_text
    from megatron_sphinx.prepare.text_formats import MOST_RANGE, PerFile, TextSettings
    from megatron_sphinx.ranges import check_range

    settings = TextSettings(
        keys=PerFile("--key", args.key), encodings=PerFile("--encoding", args.encoding),
        formats=PerFile("--format", args.format), most_characters=args.most_characters,
    )  # fmt: skip
    check_range(settings.most_characters, MOST_RANGE, "--most-characters")
    report = write_text(
        args.files, args.target, Tokenizer(args.tokenizer), settings,
        held_out=args.held_out, workers=args.workers, show=True,
    )  # fmt: skip
    held_out = f", {report.held_out} more held out" if args.held_out else ""
    print(f"{args.target}: {report.taken} documents, {report.tokens} tokens{held_out}")
    print(report.left_out(), end="")
    print(report.balance("documents"))
    return 0
