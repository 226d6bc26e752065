"""`prepare pairs` and `prepare text` beside the work that nobody can spare them, in turn, in one run.

    tools/compare/prepare.py [--megabytes 64] [--pairs 8000] [--repeats 3] [--processes 2] [--folder DIR]

The text is that of Python's packages on this machine, cut into documents of 1 to 8 kB; the tokenizer is a sentencepiece
model of 8,000 pieces that is trained on some of it. Pairs are JPEGs of noise, of 20 to 120 kB, with a line of that text
and img2dataset's .json, a thousand a shard. All files are in the page cache; what ours has written is removed before
each turn, outside of what is timed. Ours is the command as users call it, its start and checksums included; so is that
of the bare work:

* text: sentencepiece alone, on documents in a list: reading, encoding, and nothing kept;
* pairs: tarfile alone over the same shards, every member read, and sentencepiece alone over the captions.

Both have so many processes. Prints a table of medians and, as the last line, one JSON object; `ratios` has the bare
work's time over ours, `core_ratios` the same of the time that all processes computed, which other work on the machine
changes less, and `peak_rss_bytes` the most that a process of ours held.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
PAIRS_PER_SHARD = 1000
VOCABULARY = 8000
BARE = """
import multiprocessing, sys, tarfile
import sentencepiece

kind, model, processes, *files = sys.argv[1:]
tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)

def text(file):
    documents = open(file).read().split("\\0")
    return sum(len(tokenizer.encode(document)) for document in documents)

def pairs(file):
    count = 0
    with tarfile.open(file) as tar:
        for member in tar:
            content = tar.extractfile(member).read()
            if member.name.endswith(".txt"):
                count += len(tokenizer.encode(content.decode()))
    return count

with multiprocessing.get_context("fork").Pool(int(processes)) as pool:
    print(sum(pool.imap_unordered({"text": text, "pairs": pairs}[kind], files)))
"""
# A process that ends as the tool does, and says on standard error how much memory it or a worker of it took.
RUN = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss), file=sys.stderr)
"""


def documents(most_bytes: int) -> Iterator[str]:
    """Yield documents of the text that Python's packages have, until they have so many bytes."""
    draw = random.Random(0)
    size = 0
    folder = Path(sysconfig.get_paths()["purelib"])
    for path in sorted(path for ending in ("py", "md", "rst", "txt") for path in folder.rglob(f"*.{ending}")):
        text = path.read_text(errors="ignore").replace("\0", "")
        begin = 0
        while begin < len(text):
            document = text[begin : begin + draw.randint(1000, 8000)]
            begin += len(document)
            if document.strip():
                size += len(document.encode())
                yield document
                if size > most_bytes:
                    return


def make_text(folder: Path, megabytes: float, parts: int) -> tuple[list[Path], list[Path]]:
    """Write the same documents as JSON lines, and as parts that the bare work reads; return both kinds of files."""
    made = list(documents(int(megabytes * 1e6)))
    lines = folder / "text.jsonl"
    with lines.open("w") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in made)
    bare = []
    for part in range(parts):
        bare.append(folder / f"{part}.nul")
        bare[-1].write_text("\0".join(made[part::parts]))
    return [lines], bare


def make_pairs(folder: Path, count: int) -> list[Path]:
    """Write shards of pictures of noise with captions, as img2dataset does."""
    draw = np.random.default_rng(0)
    pictures = []
    for _ in range(64):
        width, height = (int(side) for side in draw.integers(256, 640, 2))
        coarse = draw.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        content = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).save(content, "JPEG", quality=int(draw.integers(80, 96)))
        pictures.append(content.getvalue())
    captions = [line.strip() for text in documents(4_000_000) for line in text.split("\n") if 20 < len(line) < 200]
    shards = []
    for first in range(0, count, PAIRS_PER_SHARD):
        shards.append(folder / f"{first // PAIRS_PER_SHARD:05d}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for number in range(first, min(first + PAIRS_PER_SHARD, count)):
                picture, caption = pictures[number % len(pictures)], captions[number % len(captions)]
                about = {"caption": caption, "url": f"https://example.org/{number}.jpg", "key": f"{number:09d}"}
                about |= {"status": "success", "sha256": f"{number:064x}", "exif": "{}", "original_width": 640}
                files = {"jpg": picture, "json": json.dumps(about, indent=4).encode(), "txt": caption.encode()}
                for ending, content in files.items():
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size, member.mtime = (
                        len(content),
                        time.time(),
                    )  # in fractions, as img2dataset's writer has it
                    tar.addfile(member, io.BytesIO(content))
    return shards


def train_tokenizer(folder: Path) -> Path:
    """Train a sentencepiece model as LLaMA's is made: byte pairs over unchanged text, and bytes for what is rare."""
    import sentencepiece

    model = folder / "tokenizer.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=documents(4_000_000), model_writer=file, vocab_size=VOCABULARY, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
            minloglevel=2, max_sentence_length=10_000,
        )  # fmt: skip
    return model


@dataclass(frozen=True)
class Turn:
    """One call of ours, or of the bare work.

    Attributes:
        seconds: that passed.
        core_seconds: that all of its processes computed.
        peak_rss_bytes: the most that one process of ours held; 0 of the bare work.
    """

    seconds: float
    core_seconds: float
    peak_rss_bytes: int


def computed() -> float:
    """Return the seconds that all processes that have ended have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def turn(command: list[str], target: Path | None) -> Turn:
    """Time a command, whose target is removed."""
    os.sync()
    before, begin = computed(), time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - begin
    if target is not None:
        shutil.rmtree(target)
    return Turn(seconds, computed() - before, int(done.stderr.split()[-1]) * 1024 if target else 0)


def main() -> int:
    """Run the comparison and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=64, help="of text")
    parser.add_argument("--pairs", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where the files are made; the default for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, target = Path(name), Path(name) / "target"
        model = train_tokenizer(folder)
        shards = make_pairs(folder, args.pairs)
        sources, parts = make_text(folder, args.megabytes, 2 * args.processes)
        commands: dict[tuple[str, str], list[str]] = {}
        for kind, files, bare in (("text", sources, parts), ("pairs", shards, shards)):
            tool = [str(ROOT / "tools" / f"prepare_{kind}.py"), *map(str, files), str(target)]
            settings = ["--tokenizer", str(model), "--workers", str(args.processes)]
            commands[kind, "bare"] = [
                sys.executable,
                "-c",
                BARE,
                kind,
                str(model),
                str(args.processes),
                *map(str, bare),
            ]
            commands[kind, "ours"] = [sys.executable, "-c", RUN, *tool, *settings]
        turns: dict[tuple[str, str], list[Turn]] = {contender: [] for contender in commands}
        for number in range(args.repeats + 1):
            for contender, command in commands.items():
                measured = turn(command, target if contender[1] == "ours" else None)
                turns[contender] += [measured] if number else []  # the first is a warm-up
    print(f"{'':<12}{'seconds':>9}{'core seconds':>14}{'peak RSS MB':>13}")
    for (kind, contender), own in turns.items():
        peak = max(one.peak_rss_bytes for one in own)
        times = median(one.seconds for one in own), median(one.core_seconds for one in own)
        print(f"{f'{kind} {contender}':<12}{times[0]:9.2f}{times[1]:14.2f}{f'{peak / 1e6:.0f}' if peak else '':>13}")
    result: dict[str, dict[str, float]] = {"ratios": {}, "core_ratios": {}, "peak_rss_bytes": {}}
    for kind in ("text", "pairs"):
        both = list(zip(turns[kind, "bare"], turns[kind, "ours"], strict=True))
        result["ratios"][kind] = round(median(bare.seconds / ours.seconds for bare, ours in both), 3)
        result["core_ratios"][kind] = round(median(bare.core_seconds / ours.core_seconds for bare, ours in both), 3)
        result["peak_rss_bytes"][kind] = max(ours.peak_rss_bytes for _, ours in both)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
