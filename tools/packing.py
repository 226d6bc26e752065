"""Print how full the rows of a run's steps are and how even the work of its replicas is, before anything is started.

    tools/packing.py CONFIG [key=value …] [--sequence-lengths 2048 4096] [--replicas 1 8 64] [--steps 20]

Plans the first steps of a configuration from its indexes, for each length of a row and number of replicas, with that
number as data.row_multiple. `fill` is the share of the rows' capacity that is used, `at most` what it could be if the
step were cut like a rope; `imbalance` is the costliest replica over the mean; all three are means of the steps, beside
the worst imbalance.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from megatron_sphinx import config as configuration
from megatron_sphinx.data.sources import make_planner, open_sources
from megatron_sphinx.errors import SphinxError


def main() -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    try:
        config = configuration.load(args.config, args.overrides)
        sources = open_sources(config.data, config.model)
        sources.check()
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    print("sequence_length  replicas  row_multiple  rows    fill  at most  imbalance   worst")
    for length in args.sequence_lengths:
        for replicas in args.replicas:
            data = replace(config.data, sequence_length=length, row_multiple=replicas)
            planner = make_planner(data, sources, config.model, config.vision, replicas=replicas, seed=config.run.seed)
            steps = [planner.step(step) for step in range(args.steps)]
            fill = fmean(step.fill for step in steps)
            most_fill = fmean(step.positions / length / -(-step.positions // length) for step in steps)
            rows = fmean(len(step.rows) for step in steps)
            imbalance = [step.imbalance for step in steps]
            print(
                f"{length:15}{replicas:10}{replicas:14}{rows:6.0f}{fill:8.1%}{most_fill:9.1%}{fmean(imbalance):11.4f}{max(imbalance):8.4f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
