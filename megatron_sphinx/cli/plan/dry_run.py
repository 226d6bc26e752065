"""Take the real step on a rank of each role, in a world that is not there and without memory, and count.

    megatron-sphinx plan dry-run CONFIG [key=value ...] [--ranks N] [--gpu KIND] [--json]

Counts FLOPs, peak memory and the bytes of every collective, beside the arithmetic that step times are predicted from.
Each role is a process that is forked here.
"""

import argparse

from megatron_sphinx.cli.plan import sizes
from megatron_sphinx.cli.plan.cluster import add_gpu, read, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    sizes.add_arguments(parser)
    add_gpu(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    plan = read(args)
    layout = plan.layout
    from megatron_sphinx.sizing import dry_run

    return show(dry_run.report(plan.config, layout, plan.kind), dry_run.table, is_json=args.json)
