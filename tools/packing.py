"""Print how full the rows of a run's steps are: a door to `megatron-sphinx packing`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli import packing
from megatron_sphinx.cli.command import run_alone

main = partial(run_alone, packing)

if __name__ == "__main__":
    sys.exit(main())
