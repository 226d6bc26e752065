"""Make conversations ready to train on: a door to `megatron-sphinx prepare conversations`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli.command import run_alone
from megatron_sphinx.cli.prepare import conversations

main = partial(run_alone, conversations)

if __name__ == "__main__":
    sys.exit(main())
