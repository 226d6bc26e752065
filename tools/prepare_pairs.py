"""Make image-text pairs ready to train on: a door to `megatron-sphinx prepare pairs`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli.command import run_alone
from megatron_sphinx.cli.prepare import pairs

main = partial(run_alone, pairs)

if __name__ == "__main__":
    sys.exit(main())
