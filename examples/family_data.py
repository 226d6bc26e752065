"""Make the data of the family: two kinds of captions for the demo's digits, and tasks on rows of digits.

    examples/family_data.py [FOLDER]

Writes into FOLDER (data/family), from what examples/demo_data.py has made:

* real/ and syn/: the digits with captions as people write them, and with captions as a model would write them;
  held_out/ in each has digits that training never sees;
* centre/ and corner/: conversations about rows of one to three digits, for models that pad at the centre or in the
  corner: which digit is where, what is it, how many are there; tests/ in each has rows of held-out digits,
  every question with all answers that are possible, the right one first.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from demo_data import CAPTIONS, DIGITS, HELD_OUT, digits
from PIL import Image

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.prepare import tasks
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.pairs import index_shards, write_shards

SYNTHETIC = "a black and white image of the number {word} on a white background"
PLACES = {1: ("",), 2: (" on the left", " on the right"), 3: (" on the left", " in the middle", " on the right")}
COUNTS = ("one", "two", "three")
SIDE = 32  # pixels of a digit in a row
ROWS, TEST_ROWS = 2400, 60
SYSTEM = {"from": "system", "value": "A chat."}  # short, for a small model


def captioned(folder: Path, pixels: Sequence[np.ndarray], labels: Sequence[int], kind: str) -> Path:
    """Write a folder of digits with captions of one kind, `real` or synthetic; return the folder."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        template = CAPTIONS[rng.integers(len(CAPTIONS))] if kind == "real" else SYNTHETIC
        Image.fromarray(picture).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(template.format(word=DIGITS[label]))
    return folder


def questions(image: str, row: Sequence[int], padding: str, rng: np.random.Generator) -> Iterator[tuple[str, list]]:
    """Yield the name of a task, and its conversations about a row: the right one, then those with other answers."""
    record = {"image": image, "width": SIDE * len(row), "height": SIDE}
    index = int(rng.integers(len(row)))
    question = f"Which digit is{PLACES[len(row)][index]}?" if len(row) > 1 else "Which digit is it?"
    words = [DIGITS[row[index]], *(word for word in DIGITS if word != DIGITS[row[index]])]
    yield "vqa", [tasks.vqa(record | {"question": question, "answer": word}, padding) for word in words]
    counts = [COUNTS[len(row) - 1], *(word for word in COUNTS if word != COUNTS[len(row) - 1])]
    yield "count", [tasks.vqa(record | {"question": "How many digits?", "answer": word}, padding) for word in counts]
    if len(row) == 1:
        yield "classify", [tasks.classify(record | {"class": word}, padding) for word in words]


def rows_of(folder: Path, pixels: np.ndarray, labels: np.ndarray, count: int, seed: int) -> Iterator[tuple[str, list]]:
    """Write pictures of rows of one to three digits to a folder; yield name and digits of each."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        chosen = rng.integers(len(pixels), size=1 + number % 3)
        row = Image.fromarray(np.concatenate([pixels[n] for n in chosen], 1))
        row.resize((SIDE * len(chosen), SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.png")
        yield f"{number:05d}.png", [int(labels[n]) for n in chosen]


def write(path: Path, conversations: Sequence[dict]) -> Path:
    """Write conversations as a JSON file, each with a short system text before it; return its path."""
    whole = [each | {"conversations": [SYSTEM, *each["conversations"]]} for each in conversations]
    path.write_text(json.dumps(whole))
    return path


def main() -> int:
    """Make the data; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/family"))
    parser.add_argument("--demo", type=Path, default=Path("data/demo"))
    args = parser.parse_args()
    done = args.folder / "prepared.txt"
    if done.is_file():
        print(f"{args.folder}: {done.read_text()}", end="")
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(args.demo / "tokenizer.model")
    pixels, labels = digits()
    seen, unseen = (pixels[HELD_OUT:], labels[HELD_OUT:]), (pixels[:HELD_OUT], labels[:HELD_OUT])
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        for kind in ("real", "syn"):
            for part, part_digits in (("", seen), ("held_out", unseen)):
                pictures = captioned(temporary / f"{kind}{part}", *part_digits, kind)
                shards = write_shards(pictures, args.folder / kind / part / "shards", 2000)
                index_shards(shards, args.folder / kind / part, tokenizer)
        rows = list(rows_of(temporary / "rows", *seen, ROWS, 2))
        tests = list(rows_of(temporary / "tests", *unseen, TEST_ROWS, 3))
        for padding in ("centre", "corner"):
            rng, target = np.random.default_rng(4), args.folder / padding
            asked = []
            for image, row in rows:
                right = [first for _, (first, *_) in questions(image, row, padding, rng)]
                asked += [right[n] for n in rng.permutation(len(right))]  # any may come first, as in the tests
            dialogs = write(temporary / "dialogs.json", tasks.merge(asked, 3))
            made = index_conversations([dialogs], target, tokenizer, images=temporary / "rows")
            exam = [task for image, row in tests for task in questions(image, row, padding, rng)]
            every = write(temporary / "tests.json", [choice for _, choices in exam for choice in choices])
            index_conversations([every], target / "tests", tokenizer, images=temporary / "tests")
            keys = [{"task": task, "choices": len(choices)} for task, choices in exam]
            (target / "tests" / "questions.json").write_text(json.dumps(keys))
    done.write_text(f"{len(seen[0])} digits with two captions, {made.taken} dialogs, {len(exam)} questions held out\n")
    print(f"{args.folder}: {done.read_text()}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
