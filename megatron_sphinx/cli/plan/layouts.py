"""Print the layouts that fit a cluster, the fastest first, with key=value for `train`, and why others do not fit.

    megatron-sphinx plan layouts CONFIG [key=value ...] --nodes 4 --gpus-per-node 8 --gpu a100-80g

Needs neither GPU nor data; without data it says what it has assumed.
"""

import argparse

from megatron_sphinx.cli.plan.cluster import add_cluster, add_gpu, add_json, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_cluster(parser)
    add_kind(parser)
    add_json(parser)


def add_kind(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the kind of GPU, and whether only the configured layout is asked for."""
    add_gpu(parser)
    parser.add_argument("--as-configured", action="store_true", help="only the layout that the file asks for")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    plan = read(args)
    from megatron_sphinx.sizing import layouts

    text = layouts.plan(
        plan.config, nodes=plan.nodes, ranks_per_node=plan.ranks_per_node, kind=plan.kind,
        is_json=args.json, is_as_configured=args.as_configured,
    )  # fmt: skip
    print(text)
    return 0
