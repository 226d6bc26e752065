"""Make image-text pairs ready to train on: WebDataset shards, and an index that knows every sample.

    tools/prepare_pairs.py SOURCE... TARGET --tokenizer MODEL

SOURCE is a folder of images with captions (x.png and x.txt), which are packed into shards under TARGET, or WebDataset
or img2dataset tars, which stay where they are. The index is written to TARGET: give that as data.pairs.
"""

import argparse
import sys
from pathlib import Path

from megatron_sphinx.data.pairs import index_shards, write_shards
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError, SphinxError


def main() -> int:
    """Run the tool; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece model")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="of shards made from a folder")
    args = parser.parse_args()
    try:
        tokenizer = Tokenizer(args.tokenizer)
        shards: list[Path] = []
        for number, source in enumerate(args.sources):
            if source.is_dir():
                shards += write_shards(source, args.target / f"shards{number:03d}", args.samples_per_shard)
            elif source.is_file():
                shards.append(source)
            else:
                raise DataError(f"{source}: no such file or folder")
        report = index_shards(shards, args.target, tokenizer)
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{args.target}: {report.pairs} pairs in {len(shards)} shards")
    for reason, count in sorted(report.rejected.items()):
        print(f"  left out: {count} ({reason})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
