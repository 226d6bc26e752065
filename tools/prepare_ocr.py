"""Make conversations about pages from PDFs: a door to `megatron-sphinx prepare ocr`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli.command import run_alone
from megatron_sphinx.cli.prepare import ocr

main = partial(run_alone, ocr)

if __name__ == "__main__":
    sys.exit(main())
