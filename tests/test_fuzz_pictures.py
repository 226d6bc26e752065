"""Mutated files of each kind that these tools read: no traceback, no hang, no memory, and nothing is lost silently."""

import json
import random
import resource
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import draw
from test_picture_kinds import FILES, KINDS
from test_samples import in_json, sample, tar

from megatron_sphinx.data import images
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.prepare.answers import merge_answers
from megatron_sphinx.prepare.conversations import index_conversations
from megatron_sphinx.prepare.json_files import read_items_or_object
from megatron_sphinx.prepare.marks import write_marks
from megatron_sphinx.prepare.pairs import index_shards
from megatron_sphinx.prepare.tasks import TASKS, Built, build

QUICK, MANY = 60, 2000
VALUES = (
    "null", "true", "NaN", "1e999", "-1", "[]", "{}", '""', '"\\ud83d"', '"a\\u0000"', "1" * 400, "[" * 1500, "0.5",
    "[" * 1500 + "]" * 1500,
)  # fmt: skip


def mutated(content: bytes, rng: random.Random, values: tuple[str, ...] = ()) -> bytes:
    """Change bytes, cut out, repeat, or swap in a value that JSON can hold."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1)
        size = rng.choice((1, 2, 8, 64, 512))
        kind = 4 if values and rng.random() < 0.6 else rng.randrange(4)
        if kind == 0:
            data[place : place + size] = rng.randbytes(size)
        elif kind == 1:
            del data[place : place + size]
        elif kind == 2:
            data[place:place] = data[place : place + size]
        elif kind == 3:
            del data[place:]
        else:
            begin = data.find(b":", place)
            end = min((at for mark in b",}" if (at := data.find(mark, begin)) > 0), default=len(data))
            data[begin + 1 : end] = rng.choice(values).encode()
        data = data or bytearray(b"\0")
    return bytes(data)


def dialogs() -> bytes:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    items = [{"id": 1, "image": "a.png", "conversations": turns}, {"images": ["a.png"], "conversations": turns},
             {"conversations": [{"from": "system", "value": "Hello."}, *turns[1:], *turns[1:]]}]  # fmt: skip
    return json.dumps(items).encode()


def annotations() -> dict:
    def entry(number: int, image: float, **more: object) -> dict:
        return {"id": number, "image_id": image, "category_id": 1.0, "bbox": [1, 2, 9, 8], "iscrowd": 0, **more}

    width, height = draw(1)[0].size
    return {
        "images": [{"id": n, "file_name": "a.png", "width": width, "height": float(height)} for n in (1, 2)],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [
            entry(1, 1, caption="a dog", phrases=["a dog", "it"], segmentation=[[1, 2, 9, 2, 9, 9]]),
            entry(2, 2.0, caption="b", phrases=["b"], keypoints=[1, 2, 2] * 17, segmentation={"counts": [1]}),
        ],
    }


RECORDS = {
    "question": "Q?", "answer": "A", "options": ["a", "b"], "tokens": ["t"], "caption": "a dog", "phrase": "dog",
    "image": "a.png", "width": 30, "height": 20, "box": [1, 2, 9, 8], "boxes": [[1, 2, 9, 8]], "name": "dog",
    "objects": [{"name": "dog", "box": [1, 2, 9, 8]}], "phrases": [{"phrase": "dog", "boxes": [[1, 2, 9, 8]]}],
    "people": [{"box": [1, 2, 9, 8], "keypoints": [1, 2, 2] * 17}], "texts": [{"text": "x", "box": [1, 2, 9, 8]}],
    "subject": {"name": "a", "box": [1, 2, 9, 8]}, "object": {"name": "b", "box": [1, 2, 9, 8]}, "relation": "on",
    "class": "daisy",
}  # fmt: skip


def fuzz_pictures(_tiny, _folder: Path, rng: random.Random) -> None:
    kinds = [*KINDS.values(), *(lambda make=make: make(6) for make in FILES.values())]
    content = mutated(rng.choice(kinds)(), rng)
    shape = images.shape_of(content)
    assert images.decode(content).size == (shape.width, shape.height)


def lines_of(folder: Path) -> int:
    return len((folder / "quarantine.jsonl").read_text().splitlines())


def fuzz_tars(tiny, folder: Path, rng: random.Random) -> None:
    files = (
        sample("a/0", 1)
        | sample("n" * 120, 2, "JPG")
        | {"2.png": b"x", "2.json": in_json("x")}
        | sample("caf\udce9", 3)
    )
    kind = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT if rng.random() < 0.5 else tarfile.GNU_FORMAT))
    if kind == tarfile.PAX_FORMAT:
        files = {name: content for name, content in files.items() if "\udce9" not in name}
    content = tar(files, kind)
    (folder / "0.tar").write_bytes(mutated(content * rng.choice((1, 2)), rng))
    report = index_shards([folder / "0.tar"], folder / "pairs", tiny.tokenizer, held_out=0.3)
    assert report.balance("pairs")
    assert lines_of(folder / "pairs") == report.quarantined


def fuzz_dialogs(tiny, folder: Path, rng: random.Random) -> None:
    draw(1)[0].save(folder / "a.png")
    content = dialogs()
    if rng.random() < 0.5:
        content = b"\n".join(json.dumps(item).encode() for item in json.loads(content))
    (folder / "d.json").write_bytes(mutated(content, rng, VALUES))
    report = index_conversations([folder / "d.json"], folder / "c", tiny.tokenizer)
    assert report.balance("conversations")
    assert lines_of(folder / "c") == report.quarantined


def fuzz_annotations(_tiny, folder: Path, rng: random.Random) -> None:
    task = rng.choice(list(TASKS))
    is_coco = TASKS[task].coco is not None and rng.random() < 0.7
    content = annotations() if is_coco else [RECORDS, RECORDS | {"answer": 1}]
    (folder / "a.json").write_bytes(mutated(json.dumps(content).encode(), rng, VALUES))
    left_out, counts = [], Built()
    list(build(task, read_items_or_object(folder / "a.json"), "centre", lambda *why: left_out.append(why), counts))
    assert counts.inputs == counts.taken + len(left_out)


def fuzz_marks(_tiny, folder: Path, rng: random.Random) -> None:
    draw(1)[0].save(folder / "a.png")
    (folder / "a.json").write_bytes(mutated(json.dumps(annotations()).encode(), rng, VALUES))
    assert write_marks(folder / "a.json", folder, folder / "out").balance("marked")


def fuzz_answers(_tiny, folder: Path, rng: random.Random) -> None:
    prompt = {"image": "a.png", "marks": 2, "description": "d", "question": "q"}
    prompts = b"\n".join(json.dumps(prompt | {"id": str(n)}).encode() for n in range(3))
    answers = b"\n".join(json.dumps({"id": n, "answer": "Mark 1."}).encode() for n in range(3))
    (folder / "p.jsonl").write_bytes(mutated(prompts, rng, VALUES) if rng.random() < 0.3 else prompts)
    (folder / "a.jsonl").write_bytes(mutated(answers, rng, VALUES))
    assert merge_answers(folder / "p.jsonl", folder / "a.jsonl", folder / "t.jsonl").balance("conversations")


READERS = (fuzz_pictures, fuzz_tars, fuzz_dialogs, fuzz_annotations, fuzz_marks, fuzz_answers)


def run(read: Callable[..., None], tiny, folder: Path, count: int, seed: int) -> None:
    said: list[str] = []
    sys.stdout.write(f"seed {seed}\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        begin = time.monotonic()
        try:
            read(tiny, place, random.Random(f"{seed} {number}"))
        except SphinxError as error:
            said.append(str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}, number {number}: {error!r}") from error
        assert time.monotonic() - begin < 10, (seed, number)
        shutil.rmtree(place)
    assert not [message for message in said if "\n" in message or "<_io" in message]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize("read", READERS)
def test_a_mutated_file_is_read_or_refused(tiny, tmp_path, read):
    run(read, tiny, tmp_path, QUICK, seed=16)


@pytest.mark.fuzz
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("read", READERS)
def test_thousands_of_mutated_files_are_read_or_refused(tiny, tmp_path, read):
    run(read, tiny, tmp_path, MANY, seed=random.SystemRandom().randrange(2**32))
