"""Conversions of a Llama beside `cp` of the same files, in turn, in one run.

    tools/compare/convert.py [--gb 2.2 9] [--directions hf-megatron ...] [--repeats 7] [--folder DIR]

The model has TinyLlama's widths and as many layers as make `--gb` GB of bf16 weights, drawn at random. Its files are in
the page cache, where there is room for them; what was written is removed, and the disk synchronised, before each turn,
outside of what is timed. Neither side synchronises its tensors' files. Ours is the tool as users call it, its start and
checksums included. Rates are bytes read and written in a second: to megatron, ours reads bf16 and writes fp32.

Prints a table of medians and, as the last line, one JSON object: for each size and direction `ratios`, our rate over
that of cp, the median of all turns, and `peak_rss_bytes`, the most of all turns.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from processes import Turn, apart, run, size_of
from random_llama import LARGEST_BYTES, write_llama

TOOL = str(Path(__file__).parents[1] / "convert_checkpoint.py")
DIRECTIONS = ("hf-megatron", "hf-meta", "hf-torch_dist", "meta-hf")


def ours(source: Path, target: Path, form: str) -> list[str]:
    """Return the command of a conversion."""
    return [sys.executable, TOOL, str(source), str(target), "--to", form]


def compare(direction: str, source: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Convert a checkpoint and copy it, in turn."""
    form, target = direction.split("-")[1], folder / "target"
    commands: dict[str, Sequence[str]] = {
        "cp": ["cp", "-r", str(source), str(target)], "ours": ours(source, target, form)
    }  # fmt: skip
    turns: dict[str, list[Turn]] = {name: [] for name in commands}
    moved = {}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, command in commands.items():
            turn = run(command)
            moved[name] = size_of(source) + size_of(target)
            shutil.rmtree(target)
            turns[name] += [turn] if repeat else []
    rates = {name: [moved[name] / turn.seconds for turn in own] for name, own in turns.items()}
    return {
        "seconds": {name: median(turn.seconds for turn in own) for name, own in turns.items()},
        "bytes": moved,
        "ratios": {"cp": round(median(a / b for a, b in zip(rates["ours"], rates["cp"], strict=True)), 3)},
        "peak_rss_bytes": max(turn.peak_rss_bytes for turn in turns["ours"]),
    }


def lines_of(direction: str, result: dict[str, Any]) -> Iterator[str]:
    """Give the lines of the table about a direction."""
    for name, seconds in result["seconds"].items():
        size = result["bytes"][name]
        row = f"{direction:<14}{name:<6}{seconds:9.2f}{size / 1e9:20.2f}{size / seconds / 1e9:8.2f}"
        is_ours = name == "ours"
        yield row + (f"{result['ratios']['cp']:10.2f}{result['peak_rss_bytes'] / 1e6:14.0f}" if is_ours else "")


def main() -> int:
    """Run the comparison and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[2.2], help="of the weights; default: 2.2")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="default: all")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each; default: 7")
    parser.add_argument("--folder", type=Path, help="where the files are made; the default for temporary files")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':<20}{'seconds':>9}{'GB read + written':>20}{'GB/s':>8}{'of cp':>10}{'peak RSS MB':>14}")
    for gigabytes in args.gb:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            apart(write_llama, folder / "hf", gigabytes)
            sized = results[f"{gigabytes:g} GB"] = {}
            for direction in sorted(args.directions):  # of one source after the other
                source = folder / direction.split("-")[0]
                if not source.is_dir():
                    run(ours(folder / "hf", source, source.name))
                    shutil.rmtree(folder / "hf")
                sized[direction] = compare(direction, source, folder, args.repeats)
                print("\n".join(lines_of(direction, sized[direction])), flush=True)
    print(json.dumps({"largest_tensor_bytes": LARGEST_BYTES, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
