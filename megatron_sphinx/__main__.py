"""Pretrain SPHINX models with megatron-core and DeepSpeed."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sphinx import config as configuration
from megatron_sphinx.config import RunConfig
from megatron_sphinx.errors import SphinxError


def train(config: RunConfig, _args: argparse.Namespace) -> int:
    """train until the configured number of steps, going on from the newest checkpoint"""
    from megatron_sphinx.run import train as run

    return run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 2 the user's mistake, 75 stopped by a signal, 1 anything else."""
    parser = argparse.ArgumentParser(prog="megatron-sphinx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (train,):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("config", type=Path, help="YAML file, e.g. examples/demo.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.tensor=2")
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(configuration.load(args.config, args.overrides), args)
    except SphinxError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return error.exit_status
    return status


if __name__ == "__main__":
    sys.exit(main())
