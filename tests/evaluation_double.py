"""A benchmark and a model for tests of what is around both: yes/no questions about drawn pictures, answered by rule."""

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from answers_double import Double
from conftest import draw

from megatron_sphinx.evaluation.benchmark import Benchmark, Metric, OfficialFile
from megatron_sphinx.evaluation.run import Wanted, agree, answer_benchmark
from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Sample, Verdict
from megatron_sphinx.generation.requests import Sampling

WORDS = ("yes", "no")


def read(folder: Path) -> Iterator[Sample]:
    for row in json.loads((folder / "rows.json").read_text()):
        yield Sample(
            id=row["id"], picture=folder / row["image"], picture_id=row["image"], fields={"question": row["question"]},
            answers=(row["answer"],), categories={"split": row["split"]}, group=row["image"],
        )  # fmt: skip


def judge(answered: Sequence[Answered], _protocol: Protocol) -> list[Verdict]:
    read = [next((word for word in WORDS if one.text.startswith(word)), None) for one in answered]
    return [
        Verdict(float(word == one.sample.answers[0]), word) for word, one in zip(read, answered, strict=True)
    ]  # fmt: skip


def figures(judged: Sequence[Judged]) -> Mapping[str, float]:
    """A mean, and a figure that is none: the share of pictures whose answers are all right."""
    groups: dict[str, bool] = {}
    for one in judged:
        group = one.answered.sample.group
        groups[group] = groups.get(group, True) and one.verdict.value == 1
    mean = sum(one.verdict.value for one in judged) / len(judged)
    return {"accuracy": 100 * mean, "whole": 100 * sum(groups.values()) / len(groups)}


METRIC = Metric("yes or no", judge, figures)
FILES = (OfficialFile("rows.json", "https://example.org/rows"),)


def benchmark(name: str = "tiny", **more: object) -> Benchmark:
    prompts = {Protocol.PAPER: "{question}?", Protocol.ACCESSORY: "{question}!"}
    given = {"title": "Tiny | one", "files": FILES, "read": read, "prompts": prompts, "max_new_tokens": 5,
             "metric": METRIC}  # fmt: skip
    return Benchmark(name=name, **{**given, **more})


def write(data: Path, pictures: int = 4, each: int = 3, name: str = "tiny", seed: int = 0) -> list[dict]:
    """Official files of a benchmark, with the questions of its pictures mixed; the rows."""
    folder, rng = data / name, random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(pictures):
        draw(number)[0].save(folder / f"{number}.png")
    rows = [
        {"image": f"{number}.png", "question": f"Is it {number} ü{each_one}", "answer": rng.choice(WORDS),
         "split": "ab"[each_one % 2]}
        for number in range(pictures) for each_one in range(each)
    ]  # fmt: skip
    rng.shuffle(rows)
    rows = [{"id": f"q{number}", **row} for number, row in enumerate(rows)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return rows


def write_pope(data: Path, pictures: Sequence[Path], each: int = 6) -> None:
    """POPE's official files, with so many questions about the pictures in each of its splits."""
    home = data / "pope"
    (home / "val2014").mkdir(parents=True)
    for picture in pictures:
        shutil.copy(picture, home / "val2014")
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": pictures[n % len(pictures)].name, "text": f"Is there a {split} {n} in it?",
             "label": WORDS[n % 2]}
            for n in range(each)
        ]  # fmt: skip
        (home / f"coco_pope_{split}.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def reply(messages, _picture) -> str:
    """A third is right at random, by the question alone; some are neither yes nor no."""
    return random.Random(messages[-1].text).choice(["yes indeed", "no", "perhaps"])


def run(
    data: Path, output: Path, double: Double, *, of: Benchmark | None = None, protocol: Protocol = Protocol.PAPER,
    sampling: Sampling | None = None, limit: int | None = None,
):  # fmt: skip
    wanted = Wanted(data, protocol, sampling or Sampling(), limit)
    told = agree(output, double, Path("m"), wanted)
    return answer_benchmark(double, told, of or benchmark(), wanted, output, in_flight=4)


def begin(data: Path, output: Path, log: Path) -> int:
    """Answer the benchmark in a process that can be killed; what is asked goes to a log. Its number."""

    def answer(messages, picture) -> str:
        with log.open("a") as file:
            file.write(f"{messages[-1].text}\n")
        return reply(messages, picture)

    number = os.fork()
    if not number:
        status = 1
        try:
            run(data, output, Double(answer, seconds=0.01))
            status = 0
        finally:
            os._exit(status)
    return number
