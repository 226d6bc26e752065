"""Print how full the rows of a run's steps are and how even the work of its replicas is, before anything is started.

    megatron-sphinx packing CONFIG [key=value ...] [--sequence-lengths 2048 4096] [--replicas 1 8 64] [--steps 20]

Plans the first steps of a configuration from its indexes, for each length of a row and number of replicas, with that
number as data.row_multiple. `fill` is the share of the rows' capacity that is used, `at most` what it could be if the
step were cut like a rope; `imbalance` is the costliest replica over the mean; all three are means of the steps, beside
the worst imbalance.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_sphinx.cli.command import add_configuration

if TYPE_CHECKING:
    from megatron_sphinx.data.plan import StepPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_configuration(parser)
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=20)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx import config as configuration

    config = configuration.load(args.config, args.overrides)
    from megatron_sphinx.data.sources import make_planner, open_sources

    sources = open_sources(config.data, config.model)
    sources.check()
    print("sequence_length  replicas  row_multiple  rows    fill  at most  imbalance   worst")
    for length in args.sequence_lengths:
        for replicas in args.replicas:
            at_once = 1 if config.data.micro_batch_rows == "auto" else config.data.micro_batch_rows
            rows = {"row_multiple": replicas, "micro_batch_rows": at_once}
            data = replace(config.data, sequence_length=length, **rows)
            planner = make_planner(data, sources, config.model, config.vision, replicas=replicas, seed=config.run.seed)
            print(_row(length, replicas, [planner.step(step) for step in range(args.steps)]))
    return 0


def _row(length: int, replicas: int, steps: list[StepPlan]) -> str:
    """The line of the table for steps that were planned with this length of a row and this number of replicas."""
    fill = fmean(step.fill for step in steps)
    most_fill = fmean(step.positions / length / -(-step.positions // length) for step in steps)
    rows = fmean(len(step.rows) for step in steps)
    imbalance = [step.imbalance for step in steps]
    return (
        f"{length:15}{replicas:10}{replicas:14}{rows:6.0f}{fill:8.1%}{most_fill:9.1%}"
        f"{fmean(imbalance):11.4f}{max(imbalance):8.4f}"
    )
