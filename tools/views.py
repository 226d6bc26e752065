"""Print what skipping views saves: a door to `megatron-sphinx views`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli import views
from megatron_sphinx.cli.command import run_alone

main = partial(run_alone, views)

if __name__ == "__main__":
    sys.exit(main())
