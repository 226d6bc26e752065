"""Measure a configuration, and what sweeps make of it, on real ranks in turn; write points and a report.

    megatron-sphinx benchmark CONFIG [key=value ...] --ranks N [--sweep key=a,b,c]

Prints a table, where the report is, and, as the last line, the speeds as one JSON object.
"""

import argparse
import json
from pathlib import Path

from megatron_sphinx.cli.command import add_configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_configuration(parser)
    add_steps(parser)
    add = parser.add_argument
    add("--ranks", type=int, required=True, help="ranks of each run")
    add("--repeats", type=int, default=2, help="runs of each point, in turn with the others; default: 2")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="key=a,b,c",
        help="values of a key; of several, all combinations",
    )
    add("--synthetic", action="store_true", help="make up the data, draw the encoders' weights")
    add("--output", type=Path, default=Path("runs/benchmark"), help="folder; default: runs/benchmark")
    add(
        "--launcher",
        default="",
        help="what starts a command on all ranks, e.g. 'srun --nodes 2'; default: torchrun here",
    )


def add_steps(parser: argparse.ArgumentParser) -> None:
    """Let a parser take how many steps of each run are measured."""
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each run; default: 20")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them; default: 5")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx import config as configuration

    configuration.values_of(args.config)  # a file that cannot be read is no fault of a point
    from megatron_sphinx.benchmark import report, sweep

    measurement = sweep.Measurement(
        config=args.config, overrides=tuple(args.overrides), ranks=args.ranks, steps=args.steps, warmup=args.warmup,
        repeats=args.repeats, folder=args.output, launcher=args.launcher, is_synthetic=args.synthetic,
    )  # fmt: skip
    points = sweep.measure(measurement, sweep.points_of(args.sweep))
    ratios = sweep.ratios(points)
    path = report.write(args.output, points, ratios=ratios)
    print(report.text_table(points))
    print(f"the whole report: {path}")
    failed = [point["name"] for point in points if "error" in point]
    speeds = {point["name"]: point.get("tokens_per_second") for point in points}
    print(json.dumps({"ranks": args.ranks, "tokens_per_second": speeds, "failed": failed, "ratios": ratios}))
    return 1 if failed else 0
