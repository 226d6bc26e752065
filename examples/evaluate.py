"""Print what `make evaluate` found: each benchmark with its pictures, with those of others, and with grey ones.

    examples/evaluate.py RESULTS [--data FOLDER] [--started SECONDS]

RESULTS holds for each control of examples/evaluate_data.py a folder of folders that `megatron-sphinx evaluate` wrote,
one for each model. Accuracy of boxes is told by the number of shapes in a scene, too. Writes summary.json into RESULTS.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from evaluate_data import CONTROLS

from megatron_sphinx.evaluation.benchmarks.registry import named
from megatron_sphinx.evaluation.results import read_results

BOXES = "refcoco_val"


def figures(report: Path) -> Iterator[tuple[str, int, str, float]]:
    """Yield the title, number of questions, metric and headline figure of each benchmark in a report.json.

    A benchmark of yes or no gives its share of yes, too, which tells how far a model only ever says that.
    """
    for entry in json.loads(report.read_text())["benchmarks"]:
        names = [entry["figure"], *(name for name in entry["figures"] if name == "yes ratio")]
        for name in dict.fromkeys(names):
            yield entry["title"], entry["asked"], name, entry["figures"][name]["value"]


def by_shapes(folder: Path, data: Path) -> dict[int, tuple[int, float]]:
    """Return how many boxes were asked for, and the percentage found, by the number of shapes in the scene.

    Args:
        folder: of the evaluation.
        data: the benchmarks that it was asked.
    """
    results = read_results(folder, named(BOXES), data)
    verdicts = results.benchmark.metric.judge(results.answered, results.protocol)
    instances = json.loads((data / results.benchmark.folder / "instances.json").read_text())
    shapes = Counter(str(annotation["image_id"]) for annotation in instances["annotations"])
    asked: Counter[int] = Counter()
    found: Counter[int] = Counter()
    for answered, verdict in zip(results.answered, verdicts, strict=True):
        count = shapes[answered.sample.picture_id]
        asked[count] += 1
        found[count] += verdict.value == 1
    return {count: (asked[count], 100 * found[count] / asked[count]) for count in sorted(asked)}


def collect(results: Path, data: Path) -> dict[tuple[str, str], dict[str, tuple[int, float]]]:
    """Return the table: for each benchmark and figure, by control, the number of questions and the value."""
    table: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    for control in CONTROLS:
        for report in sorted((results / control).glob("*/report.json")):
            for title, asked, name, value in figures(report):
                table.setdefault((title, name), {})[control] = asked, value
            if (report.parent / BOXES).is_dir():
                for count, found in by_shapes(report.parent, data / control).items():
                    table.setdefault((f"  scenes of {count}", ""), {})[control] = found
    return table


def main() -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/evaluate"), help="what examples/evaluate_data.py made")
    parser.add_argument("--started", type=float, help="when it all began, in seconds since 1970")
    args = parser.parse_args()
    table = collect(args.results, args.data)
    print(f"{'':28}{'figure':>14}{'questions':>11}" + "".join(f"{control:>10}" for control in CONTROLS))
    for (title, name), columns in table.items():
        asked = max(count for count, _ in columns.values())
        values = "".join(f"{columns[control][1]:10.1f}" if control in columns else f"{'':10}" for control in CONTROLS)
        print(f"{title:28}{name:>14}{asked:11}{values}")
    if args.started:
        print(f"{time.time() - args.started:.0f} seconds")
    rows = [{"title": title.strip(), "figure": name, "values": columns} for (title, name), columns in table.items()]
    (args.results / "summary.json").write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
