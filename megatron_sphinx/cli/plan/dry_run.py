"""Take the real step on a rank of each role, in a world that is not there and without memory, and count.

    megatron-sphinx plan dry-run CONFIG [key=value ...] [--ranks N] [--json]

Counts FLOPs, peak memory and the bytes of every collective, beside the arithmetic that step times are predicted from.
Each role is a process that is forked here.
"""

import argparse

from megatron_sphinx.cli.plan.cluster import read, show
from megatron_sphinx.cli.plan.sizes import add_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    plan = read(args)
    layout = plan.layout
    from megatron_sphinx.sizing import dry_run

    return show(dry_run.report(plan.config, layout), dry_run.table, is_json=args.json)
