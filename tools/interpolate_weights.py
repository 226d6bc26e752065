"""Mix the weights of checkpoints: a door to `megatron-sphinx mix`, with the same flags."""

import sys
from functools import partial

from megatron_sphinx.cli import mix
from megatron_sphinx.cli.command import run_alone

main = partial(run_alone, mix)

if __name__ == "__main__":
    sys.exit(main())
