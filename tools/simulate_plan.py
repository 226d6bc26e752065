"""Plan random steps of a data set that is as large as the paper's, and print how long it takes and how much memory.

    tools/simulate_plan.py FOLDER [--pairs 400e6] [--text-tokens 600e9] [--steps 50]

The indexes in FOLDER are simulated, but of full size and opened as any run opens them: samples.bin and captions.bin are
sparse files, each token file of the text is a link to one that has as many documents as a file of RefinedWeb. Nothing
is cached between steps that are far apart. The last line printed is a JSON object.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sphinx.data.config import DataConfig, DataSource
from megatron_sphinx.data.index import SAMPLE, UPRIGHT
from megatron_sphinx.data.pairs import SampleIndex
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.data.text import TextIndex

PAIRS_PER_SHARD = 10_000
DOCUMENTS_PER_FILE, TOKENS_PER_FILE = 175_000, 108_000_000  # of the 5,534 files of RefinedWeb's public part
TOKENIZER = {"vocabulary": 32000, "sha256": "simulated"}


def simulate_pairs(folder: Path, pairs: int) -> None:
    """Write an index of so many pairs as sparse files, which take no space on the disk."""
    folder.mkdir(parents=True)
    last = np.zeros(1, SAMPLE)
    last["caption"], last["tokens"] = 10 * pairs - 10, 10
    with (folder / "samples.bin").open("wb") as file:
        file.seek((pairs - 1) * SAMPLE.itemsize)
        last.tofile(file)
    with (folder / "captions.bin").open("wb") as file:
        file.truncate(10 * pairs * 2)
    sizes = [PAIRS_PER_SHARD] * (pairs // PAIRS_PER_SHARD) + [pairs % PAIRS_PER_SHARD]
    shards = [{"path": f"{n:06d}.tar", "bytes": 0, "samples": size} for n, size in enumerate(sizes) if size]
    content = {"tokenizer": TOKENIZER, "caption_type": "<u2", "shards": shards, "sizes": UPRIGHT}
    (folder / "index.json").write_text(json.dumps(content))


def simulate_text(folder: Path, tokens: int) -> None:
    """Write an index of so many tokens, whose files are all links to two: a whole one, and one with the rest."""
    folder.mkdir(parents=True)
    whole, rest = divmod(tokens, TOKENS_PER_FILE)
    for name, size in (("whole", TOKENS_PER_FILE), ("rest", rest)):
        documents = max(size * DOCUMENTS_PER_FILE // TOKENS_PER_FILE, 1)
        shares = np.random.default_rng(0).lognormal(0.0, 1.0, documents)
        ends = np.rint(np.cumsum(shares) / shares.sum() * size).astype(np.int64)
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        builder.sequence_lengths = np.diff(ends, prepend=0).tolist()
        builder.document_indices = list(range(documents + 1))
        builder.finalize(str(folder / f"{name}.idx"))
        os.truncate(folder / f"{name}.bin", size * 2)
    files = []
    for number in range(whole + (rest > 0)):
        name, size = ("whole", TOKENS_PER_FILE) if number < whole else ("rest", rest)
        for ending in (".bin", ".idx"):
            (folder / f"{number:06d}{ending}").symlink_to(f"{name}{ending}")
        documents = max(size * DOCUMENTS_PER_FILE // TOKENS_PER_FILE, 1)
        files.append({"name": f"{number:06d}", "documents": documents, "tokens": size})
    (folder / "index.json").write_text(json.dumps({"tokenizer": TOKENIZER, "files": files}))


def own_megabytes() -> float:
    """Return the megabytes of memory that this process has by itself, mapped files not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=float, default=400e6)
    parser.add_argument("--text-tokens", type=float, default=600e9)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    pairs, tokens = int(args.pairs), int(args.text_tokens)
    shutil.rmtree(args.folder, ignore_errors=True)
    simulate_pairs(args.folder / "pairs", pairs)
    simulate_text(args.folder / "text", tokens)
    paths = {name: (DataSource(path=str(args.folder / name)),) for name in ("pairs", "text")}
    config = DataConfig(**paths, tokenizer="simulated")
    before, start = own_megabytes(), time.perf_counter()
    index, text = SampleIndex([args.folder / "pairs"]), TextIndex([args.folder / "text"])
    planner = Planner(
        config,
        samples=index,
        text=text,
        tokens_of_views=lambda width, height: (291, (0,)),
        cost=lambda lengths, _: sum(4e10 * n + 8e5 * n * n for n in lengths),
        replicas=8,
        seed=0,
    )
    opened = time.perf_counter() - start
    rng, seconds = random.Random(0), []
    for _ in range(args.steps):
        step = rng.randrange(4 * pairs // config.pairs_per_step)  # anywhere in four epochs
        start = time.perf_counter()
        planner.step(step)
        seconds.append(time.perf_counter() - start)
    figures = {
        "pairs": index.bounds[-1],
        "text_tokens": text.bounds[-1],
        "open_seconds": opened,
        "median_milliseconds": 1e3 * statistics.median(seconds),
        "most_milliseconds": 1e3 * max(seconds),
        "megabytes": own_megabytes() - before,
    }
    shutil.rmtree(args.folder)
    for name, value in figures.items():
        print(f"{name:20} {value:,.1f}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
