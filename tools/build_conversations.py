"""Make conversations from annotations: a door to `megatron-sphinx prepare tasks`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli.command import run_alone
from megatron_sphinx.cli.prepare import tasks

main = partial(run_alone, tasks)

if __name__ == "__main__":
    sys.exit(main())
