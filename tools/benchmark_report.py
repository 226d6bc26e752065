"""One report of the points of several benchmarks, such as one for each number of nodes: with curves of scaling.

    tools/benchmark_report.py FOLDER… --output FOLDER

The folders are those of `megatron-sphinx benchmark --output`. Strong scaling (the same step on more ranks) and weak
scaling (the same work on each rank) are recognised from what the points measured. Prints, as the last line, the curves'
efficiencies as one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_sphinx.benchmark import report
from megatron_sphinx.benchmark.scaling import curves
from megatron_sphinx.errors import SphinxError


def main() -> int:
    """Write the report; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="folder of report.md and its plots")
    args = parser.parse_args()
    try:
        points = report.read(args.folders)
    except SphinxError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_status
    print(f"the whole report: {report.write(args.output, points)}")
    found = [
        {"kind": curve.kind, "label": curve.label, "ranks": [point["ranks"] for point in curve.points],
         "efficiency": curve.efficiency}
        for curve in curves(points)
    ]  # fmt: skip
    print(json.dumps({"points": len(points), "curves": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
