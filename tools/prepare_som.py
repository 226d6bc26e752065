"""Make Set-of-Mark data: a door to `megatron-sphinx prepare som`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli.command import run_alone
from megatron_sphinx.cli.prepare import som

main = partial(run_alone, som)

if __name__ == "__main__":
    sys.exit(main())
