"""Make conversations ready to train on: their tokens, which of them are answers, and their images in shards.

    megatron-sphinx prepare conversations SOURCE... TARGET --tokenizer MODEL [--images FOLDER] [--follow-links]

SOURCE is a .json file with a list of conversations, or a .jsonl file with one a line. A conversation is

    {"image": "a/b.jpg", "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}

with no image where it is about none; a first turn may be from "system". Images are copied to TARGET/shards, those
that lie in FOLDER: what a link in it leads out to only with --follow-links. The index is written to TARGET: give that
as data.conversations. What cannot be used is listed in TARGET/quarantine.jsonl. Killed, the same command goes on where
it was.
"""

import argparse
from pathlib import Path

from megatron_sphinx.cli.command import add_tokenizer, add_workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    add_tokenizer(parser)
    parser.add_argument("--images", type=Path, help="folder of the images; default: that of each source")
    parser.add_argument("--follow-links", action="store_true", help="also take images that links lead out of it to")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="to TARGET/held_out, by image")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.data.tokenizer import Tokenizer
    from megatron_sphinx.prepare.conversations import index_conversations

    report = index_conversations(
        args.sources, args.target, Tokenizer(args.tokenizer),
        images=args.images, follow_links=args.follow_links, samples_per_shard=args.samples_per_shard,
        held_out=args.held_out, workers=args.workers, show=True,
    )  # fmt: skip
    held_out = f", {report.held_out} more held out" if args.held_out else ""
    print(f"{args.target}: {report.taken} conversations, {report.tokens} tokens{held_out}")
    print(report.left_out(), end="")
    print(report.balance("conversations"))
    return 0
