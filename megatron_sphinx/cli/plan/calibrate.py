"""Measure this machine by ranks that torchrun starts, into a file that `plan layouts --gpu FILE` takes.

megatron-sphinx plan calibrate CONFIG [key=value ...] --output FILE [--ranks N]

Takes minutes, and all GPUs that the ranks get.
"""

import argparse
from pathlib import Path

from megatron_sphinx.cli.plan.cluster import add_cluster, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_cluster(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="YAML file to write")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    plan = read(args)
    from megatron_sphinx.sizing import calibration

    calibration.calibrate(plan.config, ranks=plan.ranks, target=args.output)
    return 0
