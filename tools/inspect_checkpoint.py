"""Say what a checkpoint is: a door to `megatron-sphinx inspect`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli import inspect
from megatron_sphinx.cli.command import run_alone

main = partial(run_alone, inspect)

if __name__ == "__main__":
    sys.exit(main())
