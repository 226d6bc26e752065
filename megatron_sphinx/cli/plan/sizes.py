"""Print sizes, FLOPs and memory of a run in the configured layout.

megatron-sphinx plan sizes CONFIG [key=value ...] [--ranks N] [--json]

Needs neither GPU nor data.
"""

import argparse

from megatron_sphinx.cli.plan.cluster import add_cluster, add_json, read, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_cluster(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    plan = read(args)
    layout = plan.layout  # is refused, where it must be, before torch is imported
    from megatron_sphinx.sizing import sizes

    return show(sizes.sizes(plan.config, layout), sizes.table, is_json=args.json)
