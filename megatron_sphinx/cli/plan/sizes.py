"""Print sizes, FLOPs and memory of a run in the configured layout.

megatron-sphinx plan sizes CONFIG [key=value ...] [--ranks N] [--json]

Needs neither GPU nor data.
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
    from megatron_sphinx.sizing import sizes

    sizes_of_run = sizes.sizes(plan.config, layout)
    print(json.dumps(sizes_of_run, indent=1) if args.json else sizes.table(sizes_of_run))
    return 0
