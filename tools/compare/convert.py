"""Conversion of a Hugging Face Llama to our format beside `cp` of the same files, in turn, in one run.

    tools/compare/convert.py [--gb 2.2] [--repeats 3] [--folder DIR]

The model has TinyLlama's widths and as many layers as make `--gb` GB of bf16 weights, drawn at random. Its files are in
the page cache; what was written is removed, and the disk synchronised, before each turn, outside of what is timed.
Neither side synchronises its tensors' files. Ours is the tool as users call it, its start and checksums included.

Prints a table of medians and, as the last line, one JSON object; `ratios` has our rate over that of cp, each in bytes
read and written a second (ours reads bf16 and writes fp32); `peak_rss_bytes` is the most of all turns.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
MAKE = """
import json, sys
from pathlib import Path
import torch
from megatron_sphinx.checkpoint.formats import huggingface
from megatron_sphinx.checkpoint.formats.format import WriteOptions
from megatron_sphinx.checkpoint.mapping.axes import Model
from megatron_sphinx.tensors.write import create_file
from megatron_sphinx.model.architecture import LanguageConfig

folder, goal = Path(sys.argv[1]), float(sys.argv[2])
values = dict(hidden=2048, ffn=5632, heads=32, groups=4, vocabulary=32000)
one = LanguageConfig(layers=1, **values)
layers = max(1, round((goal / 2 - 2 * one.vocabulary * one.hidden) / one.layer_matrices))
model = Model(LanguageConfig(layers=layers, **values))
files, companions = huggingface.plan(model, WriteOptions(shard_bytes=10**9), {})
for file in files:
    out = create_file(folder / file.name, {item.name: (item.shape, torch.bfloat16) for item in file.tensors})
    for item in file.tensors:
        out.put(item.name, torch.empty(item.shape, dtype=torch.bfloat16).normal_(std=0.02))
    out.close()
for name, content in companions.items():
    (folder / name).write_text(json.dumps(content))
"""
# A process that ends as the tool does, and says on standard error how much memory it took.
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


@dataclass(frozen=True)
class Turn:
    """One copy or conversion."""

    seconds: float
    bytes: int
    peak_rss_bytes: int

    @property
    def rate(self) -> float:
        """Bytes that were read and written in a second."""
        return self.bytes / self.seconds


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def turn(command: list[str], source: Path, target: Path) -> Turn:
    """Time a command that reads one folder and writes another, which is removed."""
    os.sync()
    begin = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    peak = int(done.stderr.split()[-1]) * 1024 if done.stderr else 0
    measured = Turn(seconds, size_of(source) + size_of(target), peak)
    shutil.rmtree(target)
    return measured


def main() -> int:
    """Run the comparison and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.2, help="of the weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are made; the default for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        source, target = Path(name) / "source", Path(name) / "target"
        source.mkdir()
        subprocess.run([sys.executable, "-c", MAKE, str(source), str(args.gb * 1e9)], check=True, cwd=ROOT)
        tool = str(ROOT / "tools" / "convert_checkpoint.py")
        commands = {
            "cp": ["cp", "-r", str(source), str(target)],
            "ours": [sys.executable, "-c", RUN, tool, str(source), str(target), "--to", "megatron"],
        }
        for command in commands.values():  # warm-up
            turn(command, source, target)
        turns: dict[str, list[Turn]] = {contender: [] for contender in commands}
        for _ in range(args.repeats):
            for contender, command in commands.items():
                turns[contender].append(turn(command, source, target))
    print(f"{'':<8}{'seconds':>9}{'GB read + written':>20}{'GB/s':>8}{'peak RSS MB':>14}")
    for contender, own in turns.items():
        peak = max(one.peak_rss_bytes for one in own)
        seconds, rate = median(one.seconds for one in own), median(one.rate for one in own)
        print(
            f"{contender:<8}{seconds:9.2f}{own[0].bytes / 1e9:20.2f}{rate / 1e9:8.2f}"
            f"{f'{peak / 1e6:.0f}' if peak else '':>14}"
        )
    ratio = median(ours.rate / cp.rate for ours, cp in zip(turns["ours"], turns["cp"], strict=True))
    peak = max(one.peak_rss_bytes for one in turns["ours"])
    print(json.dumps({"ratios": {"cp": round(ratio, 3)}, "peak_rss_bytes": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
