"""Print which samples a step takes, in which rows, and who computes and encodes what, as JSON lines.

megatron-sphinx plan step CONFIG [key=value ...] [--step 7] [--ranks N]

The first line is of the whole step, the others are of a micro-batch and replica each. Needs the indexes of the data, no
picture and no GPU.
"""

import argparse
import json

from megatron_sphinx.cli.plan.cluster import add_cluster, add_gpu, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_cluster(parser)
    add_gpu(parser)
    parser.add_argument("--step", type=int, default=0, help="which step, counted from 0; default: 0")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    plan = read(args)
    layout = plan.layout
    from megatron_sphinx.sizing import composition

    for line in composition.step(plan.config, layout, args.step, plan.kind):
        print(json.dumps(line))
    return 0
