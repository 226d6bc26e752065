"""Write one report of several benchmarks: a door to `megatron-sphinx report`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli import report
from megatron_sphinx.cli.command import run_alone

main = partial(run_alone, report)

if __name__ == "__main__":
    sys.exit(main())
