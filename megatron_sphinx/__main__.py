"""Lets `python -m megatron_sphinx` run the command line."""

import sys

from megatron_sphinx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
