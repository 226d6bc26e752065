"""Make text ready to train on: Megatron's .bin and .idx, `[BOS] text [EOS]` a document.

    tools/prepare_text.py FILE... PREFIX --tokenizer MODEL

Each line of a .jsonl, each row of a .parquet, and each other file as a whole is a document. Give PREFIX as data.text.
"""

import argparse
import sys
from pathlib import Path

from megatron_sphinx.data.text import write_text
from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.errors import DataError, SphinxError


def main() -> int:
    """Run the tool; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("prefix", type=Path, metavar="PREFIX")
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece model")
    parser.add_argument("--key", default="content", help="key or column of the text (RefinedWeb: content)")
    args = parser.parse_args()
    try:
        for file in args.files:
            if not file.is_file():
                raise DataError(f"{file}: no such file")
        documents, tokens = write_text(args.files, args.prefix, Tokenizer(args.tokenizer), args.key)
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{args.prefix}: {documents} documents, {tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
