"""Print sizes, FLOPs and memory of a run in the configured layout.

megatron-sphinx plan sizes CONFIG [key=value ...] [--ranks N] [--json]

Needs neither GPU nor data; where the data is there, says also of how many documents a step's text is.
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
    from megatron_sphinx.sizing import composition, sizes

    values = sizes.sizes(plan.config, layout)
    if text := composition.text_of_steps(plan.config):
        values["text"] = text
    return show(values, sizes.table, is_json=args.json)
