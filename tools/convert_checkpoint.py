"""Convert a checkpoint: a door to `megatron-sphinx convert`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli import convert
from megatron_sphinx.cli.command import run_alone

main = partial(run_alone, convert)

if __name__ == "__main__":
    sys.exit(main())
