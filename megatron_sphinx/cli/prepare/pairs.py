"""Make image-text pairs ready to train on: WebDataset shards, and an index that knows every sample.

    megatron-sphinx prepare pairs SOURCE... TARGET --tokenizer MODEL

SOURCE is a WebDataset tar as img2dataset writes them, a folder of such tars, or a URL that fsspec knows
(s3://bucket/00000.tar): shards stay where they are. A folder of images with captions (x.png and x.txt) is packed into
shards under TARGET. The index is written to TARGET: give that as data.pairs. Pairs that cannot be used are listed in
TARGET/quarantine.jsonl with shard and key. Killed, the same command goes on where it was.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron_sphinx.cli.command import add_tokenizer, add_workers
from megatron_sphinx.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    add_tokenizer(parser)
    parser.add_argument("--caption-key", help="key of the caption in the .json; default: the .txt, else caption")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="to TARGET/held_out, by key")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="of shards made from a folder")
    parser.add_argument("--follow-links", action="store_true", help="also take what links lead out of a folder to")
    add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.data.tokenizer import Tokenizer
    from megatron_sphinx.prepare.pairs import index_shards
    from megatron_sphinx.prepare.workers import check_share, check_workers, target_folder

    check_share("held_out", args.held_out)
    check_workers(args.workers)
    tokenizer = Tokenizer(args.tokenizer)
    shards: list[str] = []
    left_out: list[dict[str, Any]] = []
    with target_folder(args.target):
        for number, source in enumerate(args.sources):
            shards += _shards_of(source, args.target / f"shards{number:03d}", args, left_out)
        report = index_shards(
            shards, args.target, tokenizer,
            caption_key=args.caption_key, held_out=args.held_out, workers=args.workers, show=True, left_out=left_out,
        )  # fmt: skip
    held_out = f", {report.held_out} more held out" if args.held_out else ""
    print(f"{args.target}: {report.taken} pairs in {len(shards)} shards, {report.tokens} caption tokens{held_out}")
    print(report.left_out(), end="")
    print(report.balance("pairs"))
    return 0


def _shards_of(source: str, target: Path, args: argparse.Namespace, left_out: list[dict[str, Any]]) -> list[str]:
    """The shards that a source is, or holds, or is packed into under `target`.

    Args:
        source: path or URL.
        target: folder of the shards that are made.
        args: of the command.
        left_out: gets an entry of the quarantine for what is not taken.

    Raises:
        DataError: there is no such source, or it is a folder that holds nothing to take.
    """
    from megatron_sphinx.data.files import is_url
    from megatron_sphinx.prepare.pairs import shards_in, write_shards

    folder = Path(source)
    if is_url(source) or folder.is_file():
        return [source]
    if not folder.is_dir():
        raise DataError(f"{source}: no such file or folder")
    if tars := shards_in(folder, args.target, left_out, follow_links=args.follow_links):
        return [str(tar) for tar in tars]
    packed = write_shards(
        folder, target, args.samples_per_shard,
        caption_key=args.caption_key, workers=args.workers, follow_links=args.follow_links, left_out=left_out,
    )  # fmt: skip
    return [str(shard) for shard in packed]
