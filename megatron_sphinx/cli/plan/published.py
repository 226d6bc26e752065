"""Predict the speed of runs that others have published, beside the speed that they reached.

megatron-sphinx plan published [--json]

Needs no configuration: the runs are in sizing/published.yaml, with their sources.
"""

import argparse

from megatron_sphinx.cli.plan.cluster import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.sizing import published

    return show(list(published.rows()), published.table, is_json=args.json)
