"""Mixing two checkpoints beside copying files, beside loading, mixing and saving them, and beside mergekit, in turn.

    tools/compare/interpolate.py [--gb 2.2] [--betas 0:1:0.25] [--repeats 7] [--mergekit PATH/TO/mergekit-yaml]

Makes two random bf16 Llamas of Hugging Face's format and, all in the page cache where there is room for them, runs what
is compared, each as a process of its own:
    cp        reads both and writes one: cat A B > /dev/null; cp A C
    ours      tools/interpolate_weights.py
    plain     a script that loads both by safetensors' load_file, mixes them in fp32 and calls save_file
    mergekit  mergekit-yaml, its method `linear`, if it is installed, best in an environment of its own
    sweep     ours, with several values of beta: reads both once and writes a mix for each

Prints a table of medians, and as the last line one JSON object; `ratios` is the speed of ours over that of each, and
`sweep_ratio` the bytes that a sweep reads and writes in a second over those of cp.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from processes import Turn, apart, run, size_of
from random_llama import LARGEST_BYTES, write_llama

TOOL = str(Path(__file__).parents[1] / "interpolate_weights.py")
BETA = 0.6
PLAIN = f"""
import sys
from safetensors.torch import load_file, save_file
a, b = (load_file(path + "/model.safetensors") for path in sys.argv[1:3])
mixed = {{name: ({BETA} * one.float() + {1 - BETA} * b[name].float()).to(one.dtype) for name, one in a.items()}}
save_file(mixed, sys.argv[3] + "/model.safetensors", metadata={{"format": "pt"}})
"""


def commands(folder: Path, betas: str, mergekit: str | None) -> dict[str, Sequence[str]]:
    """Return the command of each contender; what it writes is under `out`."""
    a, b, out = (str(folder / name) for name in ("A", "B", "out"))
    mix = [sys.executable, TOOL, "--real", a, "--synthetic", b, "--output", out]
    compared: dict[str, Sequence[str]] = {
        "cp": ["sh", "-c", f"mkdir {out}; cat {a}/* {b}/* > /dev/null; cp {a}/* {out}"],
        "ours": [*mix, "--beta", str(BETA)],
        "plain": ["sh", "-c", 'mkdir "$4" && exec "$0" -c "$1" "$2" "$3" "$4"', sys.executable, PLAIN, a, b, out],
    }
    if mergekit:
        recipe = folder / "recipe.yaml"
        models = [{"model": path, "parameters": {"weight": share}} for path, share in ((a, BETA), (b, 1 - BETA))]
        recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": models}))
        compared["mergekit"] = [*mergekit.split(), str(recipe), out]
    if betas:
        compared["sweep"] = [*mix, "--beta", betas]
    return compared


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the checkpoints in a folder and run everything in turn."""
    for seed, name in enumerate("AB"):
        apart(write_llama, folder / name, args.gb, seed=seed, file_bytes=10**15)
    read, out = 2 * size_of(folder / "A"), folder / "out"
    turns: dict[str, list[Turn]] = {}
    moved = {}
    for repeat in range(args.repeats + 1):  # the first is a warm-up
        for name, command in commands(folder, args.betas, args.mergekit).items():
            turn = run(command)
            moved[name] = read + size_of(out)
            shutil.rmtree(out)
            turns.setdefault(name, []).extend([turn] if repeat else [])
    seconds = {name: median(turn.seconds for turn in own) for name, own in turns.items()}
    result = {
        "bytes": moved,
        "seconds": seconds,
        "memory": {name: max(turn.peak_rss_bytes for turn in own) for name, own in turns.items()},
        "ratios": {
            name: median(theirs.seconds / own.seconds for theirs, own in zip(turns[name], turns["ours"], strict=True))
            for name in turns if name not in ("ours", "sweep")
        },
        "peak_rss_bytes": max(turn.peak_rss_bytes for turn in turns["ours"]),
        "largest_tensor_bytes": LARGEST_BYTES,
    }  # fmt: skip
    if "sweep" in turns:
        result["sweep_ratio"] = moved["sweep"] / seconds["sweep"] / (moved["cp"] / seconds["cp"])
    return result


def table(result: dict[str, Any]) -> str:
    """Return the comparison as a table for people."""
    rows = [f"{'':10}{'seconds':>9}{'GB/s':>7}{'peak GB':>9}{'ours is':>9}"]
    for name, seconds in result["seconds"].items():
        ratio = f"{result['ratios'][name]:8.2f}x" if name in result["ratios"] else ""
        rate, memory = result["bytes"][name] / seconds / 1e9, result["memory"][name] / 1e9
        rows.append(f"{name:10}{seconds:9.2f}{rate:7.2f}{memory:9.2f}{ratio}")
    if "sweep_ratio" in result:
        rows.append(f"the sweep has {result['sweep_ratio']:.2f} of the rate of cp")
    if "mergekit" not in result["seconds"]:
        rows.append("mergekit is not installed and left out; give --mergekit PATH/TO/mergekit-yaml")
    return "\n".join(rows)


def main() -> int:
    """Run the comparison and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.2, help="size of each checkpoint; default: 2.2")
    parser.add_argument("--betas", default="0:1:0.25", help="of the sweep, as --beta of the tool; empty for no sweep")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each; default: 7")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="command; default: that of PATH")
    parser.add_argument("--folder", type=Path, help="for the checkpoints; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        result = compare(args, Path(temporary))
    print(table(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
