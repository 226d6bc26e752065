"""Write one report of the points of several benchmarks, such as one for each number of nodes, with curves of scaling.

    megatron-sphinx report FOLDER... --output FOLDER

The folders are those of `megatron-sphinx benchmark --output`. Strong scaling (the same step on more ranks) and weak
scaling (the same work on each rank) are recognised from what the points measured. Prints, as the last line, the curves'
efficiencies as one JSON object.
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="folder of report.md and its plots")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from megatron_sphinx.benchmark import report
    from megatron_sphinx.benchmark.scaling import curves

    points = report.read(args.folders)
    print(f"the whole report: {report.write(args.output, points)}")
    efficiencies = [
        {"kind": curve.kind, "label": curve.label, "ranks": [point["ranks"] for point in curve.points],
         "efficiency": curve.efficiency}
        for curve in curves(points)
    ]  # fmt: skip
    print(json.dumps({"points": len(points), "curves": efficiencies}))
    return 0
