"""Take the real step on a rank of each role, in a world that is not there and without memory, and count.

    megatron-sphinx plan dry-run CONFIG [key=value ...] [--ranks N] [--json]

Counts FLOPs, peak memory and the bytes of every collective, beside the arithmetic that step times are predicted from.
Each role is a process that is forked here.
"""

import argparse
import json

from megatron_sphinx.cli.plan.cluster import add_cluster, add_json, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_cluster(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    plan = read(args)
    layout = plan.layout
    from megatron_sphinx.sizing import dry_run

    counts = dry_run.report(plan.config, layout)
    print(json.dumps(counts, indent=1) if args.json else dry_run.table(counts))
    return 0
