"""Draw what became of the text loss of a language model that went on with captions, with text, and with both.

    examples/figure7.py RUNS [--plot FILE]

RUNS is what `make figure7` trained: `language` (text only), then from its weights `both`, `captions` and `text`. In the
run on captions the text weighs nothing, so its loss is measured and not trained on. Prints a table, and writes the plot
and `figure7.json` beside the runs.

Source: SPHINX, arXiv:2311.07575, figure 7: without text the language model forgets, with it the text loss stays.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

KINDS = {"both": "both streams", "captions": "captions only", "text": "text only"}
WINDOW = 10  # steps of a mean


def losses(run: Path, name: str) -> list[float | None]:
    """Read one loss of every step of a run; None where it has no such stream."""
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def smooth(values: list[float]) -> list[float]:
    """Average each step's value with those of the steps before it."""
    return [statistics.fmean(values[max(0, step - WINDOW + 1) : step + 1]) for step in range(len(values))]


def main() -> int:
    """Draw and print; the exit status is 1 where the figure does not show what the paper's does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    reached: dict[str, dict[str, float]] = {}
    for kind, label in KINDS.items():
        text = [value for value in losses(args.runs / kind, "loss_text") if value is not None]
        pairs = [value for value in losses(args.runs / kind, "loss_pairs") if value is not None]
        left.plot(smooth(text), label=label)
        reached[kind] = {"text_before": text[0], "text_after": smooth(text)[-1]}
        if pairs:
            right.plot(smooth(pairs), label=label)
            reached[kind] |= {"captions_before": pairs[0], "captions_after": smooth(pairs)[-1]}
    for axes, title in ((left, "text loss"), (right, "caption loss")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(args.plot or args.runs / "figure7.png", dpi=110)
    (args.runs / "figure7.json").write_text(json.dumps(reached, indent=1))
    print(f"{'trained on':16} {'text loss':>18} {'caption loss':>18}")
    for kind, values in reached.items():
        columns = [
            f"{values[f'{name}_before']:.3f} -> {values[f'{name}_after']:.3f}" if f"{name}_before" in values else ""
            for name in ("text", "captions")
        ]
        print(f"{KINDS[kind]:16} {columns[0]:>18} {columns[1]:>18}")
    climbs = reached["captions"]["text_after"] - reached["captions"]["text_before"]
    stays = reached["both"]["text_after"] - reached["both"]["text_before"]
    print(f"the text loss moves by {climbs:+.3f} on captions only, by {stays:+.3f} on both")
    return 0 if climbs > 0.1 and stays < 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
