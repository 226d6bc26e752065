"""Mixing two checkpoints beside copying files, beside loading, mixing and saving them, and beside mergekit, in turn.

    tools/compare/interpolate.py [--gb 2.2] [--repeats 3] [--mergekit PATH/TO/mergekit-yaml] [--folder SCRATCH]

Makes two random bf16 Llamas of Hugging Face's format and, all in the page cache, runs what is compared, each as a
process of its own:
    cp        reads both and writes one: cat A B > /dev/null; cp A C
    ours      tools/interpolate_weights.py
    plain     a script that loads both by safetensors' load_file, mixes them in fp32 and calls save_file
    mergekit  mergekit-yaml, its method `linear`, if it is installed

Prints a table of medians, and as the last line one JSON object; `ratios` is the speed of ours over that of each.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.formats.huggingface import plan
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.model.architecture import LanguageConfig
from megatron_sphinx.tensors.write import SafetensorsFile

TOOL = Path(__file__).parents[1] / "interpolate_weights.py"
BETA = 0.6
PLAIN = f"""
import sys
from safetensors.torch import load_file, save_file
a, b = (load_file(path + "/model.safetensors") for path in sys.argv[1:3])
mixed = {{name: ({BETA} * one.float() + {1 - BETA} * b[name].float()).to(one.dtype) for name, one in a.items()}}
save_file(mixed, sys.argv[3], metadata={{"format": "pt"}})
"""


def make(folder: Path, gigabytes: float, seed: int) -> Path:
    """Write a Llama of the shape of TinyLlama, of as many layers as fill so many GB, with random weights."""
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / 44_044_288))
    shape = LanguageConfig(layers=layers, hidden=2048, ffn=5632, heads=32, groups=4, vocabulary=32000)
    (file,), companions = plan(Model(shape), WriteOptions(dtype=torch.bfloat16, shard_bytes=10**15), {})
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    out = SafetensorsFile(folder / file.name, {item.name: (item.shape, torch.bfloat16) for item in file.tensors})
    for item in file.tensors:
        out.put(item.name, torch.randn(item.shape, generator=generator).mul_(0.02).bfloat16())
    out.close()
    for name, content in companions.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def commands(folder: Path, mergekit: str | None) -> dict[str, Sequence[str]]:
    """Return the command of each contender; what it writes is under `out`."""
    a, b, out = (str(folder / name) for name in ("A", "B", "out"))
    compared: dict[str, Sequence[str]] = {
        "cp": ["sh", "-c", f"mkdir {out}; cat {a}/* {b}/* > /dev/null; cp {a}/* {out}"],
        "ours": [sys.executable, str(TOOL), "--real", a, "--synthetic", b, "--beta", str(BETA), "--output", out],
        "plain": [sys.executable, "-c", PLAIN, a, b, f"{out}.safetensors"],
    }
    if mergekit:
        recipe = folder / "recipe.yaml"
        models = [{"model": path, "parameters": {"weight": share}} for path, share in ((a, BETA), (b, 1 - BETA))]
        recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": models}))
        compared["mergekit"] = [*mergekit.split(), str(recipe), out]
    return compared


def measure(command: Sequence[str], out: Path) -> tuple[float, int]:
    """Return seconds and peak memory in bytes of a command that succeeds; what it wrote is removed."""
    peak, begin = 0, time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if mark := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()):
                peak = max(peak, int(mark[1]) * 1024)
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)[:200]}\n{log.read().decode()[-2000:]}")
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".safetensors").unlink(missing_ok=True)
    return seconds, peak


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the checkpoints in a folder and run everything in turn."""
    for seed, name in enumerate("AB"):
        make(folder / name, args.gb, seed)
    compared = commands(folder, args.mergekit)
    measure(compared["cp"], folder / "out")  # into the page cache
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in compared}
    for _ in range(args.repeats):
        for name, command in compared.items():
            runs[name].append(measure(command, folder / "out"))
    seconds = {name: statistics.median(taken for taken, _ in each) for name, each in runs.items()}
    return {
        "bytes": (folder / "A" / "model.safetensors").stat().st_size,
        "seconds": seconds,
        "memory": {name: max(memory for _, memory in each) for name, each in runs.items()},
        "ratios": {name: taken / seconds["ours"] for name, taken in seconds.items() if name != "ours"},
        "peak_rss_bytes": max(memory for _, memory in runs["ours"]),
    }


def table(result: dict[str, Any]) -> str:
    """Return the comparison as a table for people."""
    rows = [f"{'':10}{'seconds':>9}{'GB/s':>7}{'peak GB':>9}{'ours is':>9}"]
    for name, seconds in result["seconds"].items():
        ratio = f"{result['ratios'][name]:8.2f}x" if name != "ours" else ""
        rate, memory = 3 * result["bytes"] / seconds / 1e9, result["memory"][name] / 1e9
        rows.append(f"{name:10}{seconds:9.2f}{rate:7.2f}{memory:9.2f}{ratio}")
    if "mergekit" not in result["seconds"]:
        rows.append("mergekit is not installed and left out; give --mergekit PATH/TO/mergekit-yaml")
    return "\n".join(rows)


def main() -> int:
    """Run the comparison and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.2, help="size of each checkpoint; default: 2.2")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; default: 3")
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
