"""The answers of a benchmark as they lie in a folder, put together again with what was asked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.evaluation.benchmark import Benchmark
from megatron_sphinx.evaluation.questions import digest_of, samples_of
from megatron_sphinx.evaluation.run import ANSWERS
from megatron_sphinx.evaluation.samples import Answered, Protocol
from megatron_sphinx.parsing import ParseError, read_json


@dataclass(frozen=True)
class Results:
    """What a model answered to a benchmark.

    Attributes:
        benchmark: what was asked.
        asked: how many questions there are.
        answered: the samples with their answers, in the order in which they were asked.
        faults: by ids, why the others could not be asked.
        broken: the groups of these.
        settings: what the answers follow from.
    """

    benchmark: Benchmark
    asked: int
    answered: tuple[Answered, ...]
    faults: Mapping[str, str]
    broken: frozenset[str]
    settings: Mapping[str, Any]

    @property
    def countable(self) -> tuple[Answered, ...]:
        """The answers that count: without those of groups of which another question could not be asked.

        Of a pair with one half it cannot be said whether it is right.
        """
        return tuple(one for one in self.answered if one.sample.group not in self.broken)

    @property
    def protocol(self) -> Protocol:
        """Whose rules were followed."""
        return Protocol(self.settings["protocol"])


def benchmarks_in(folder: Path, known: Mapping[str, Benchmark]) -> list[Benchmark]:
    """Return the benchmarks of which a folder has answers, whole or begun, by their names."""
    return [known[name] for name in sorted(known) if (folder / name / f"{ANSWERS}.settings.json").exists()]


def is_whole(folder: Path, benchmark: Benchmark) -> bool:
    """Say whether all questions of a benchmark are answered in a folder."""
    return (folder / benchmark.name / ANSWERS).exists()


def read_results(folder: Path, benchmark: Benchmark, data: Path) -> Results:
    """Read the answers of a benchmark, and its samples.

    Args:
        folder: of the evaluation.
        benchmark: what was asked.
        data: the folder that holds one for each benchmark.

    Raises:
        DataError: there are no whole answers, they cannot be read, or they are to other questions than those of `data`.
    """
    path = folder / benchmark.name / ANSWERS
    settings = _settings(path)
    samples = samples_of(benchmark, data, settings["limit"])
    if digest_of(benchmark, samples, Protocol(settings["protocol"]), data) != settings["digest"]:
        raise DataError(f"{path}: answers other questions than those in {data}; give the --data that was asked")
    lines = list(_lines(path))
    if [line["id"] for line in lines] != [sample.id for sample in samples]:
        raise DataError(f"{path}: has other ids than the questions; remove it and what is beside it to have it anew")
    padding = settings["model"]["padding"]
    answered = [
        Answered(sample=sample, text=line["answer"], padding=padding, ranked=_ranked(line), **_size(line))
        for sample, line in zip(samples, lines, strict=True)
        if "answer" in line
    ]
    faults = {line["id"]: str(line["error"]) for line in lines if "error" in line}
    broken = frozenset(sample.group for sample in samples if sample.id in faults and sample.group)
    return Results(benchmark, len(samples), tuple(answered), faults, broken, settings)


def copies(answered: Sequence[Answered], number: int) -> list[Answered]:
    """Return answers as those to another picture, so that they count beside the first ones and not with them.

    Args:
        answered: of one picture.
        number: of the copy; 0 for the answers as they are.
    """
    if not number:
        return list(answered)

    def renamed(one: Answered) -> Answered:
        sample = one.sample
        group = f"{sample.group} {number}" if sample.group else ""
        return replace(one, sample=replace(sample, picture_id=f"{sample.picture_id} {number}", group=group))

    return [renamed(one) for one in answered]


def _size(line: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of a line's picture as arguments of Answered."""
    return dict(zip(("width", "height"), line.get("size") or (0, 0), strict=True))


def _ranked(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the choices that were ranked, the likeliest first."""
    return tuple(name for name, _ in line.get("ranked", ()))


def _settings(path: Path) -> dict[str, Any]:
    """Read what a file of answers was made of."""
    place = path.with_name(f"{path.name}.settings.json")
    try:
        settings = read_json(place)
        if not isinstance(settings, dict) or not {"limit", "protocol", "digest", "model"} <= settings.keys():
            raise DataError(f"{place}: does not say what was asked; give a folder of evaluate")
        Protocol(settings["protocol"])
    except (ParseError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{place}: cannot be read ({shortened(reason)}); give a folder of evaluate") from error
    return settings


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file of answers."""
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                line = json.loads(text)
                if not isinstance(line, dict) or not {"answer", "error"} & line.keys() or "id" not in line:
                    raise DataError(f"{path}: line {number} is no answer; remove it and what is beside it")
                yield line
    except FileNotFoundError as error:
        raise DataError(f"{path}: is not there or not finished; run evaluate with the same settings again") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read ({shortened(error)}); remove it and what is beside it") from error
