"""Benchmarks answered by a model, each in a file of its own in one folder, which holds answers of one model alone."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sphinx.checkpoint.identity import differences
from megatron_sphinx.errors import DataError, remedy_of, shortened
from megatron_sphinx.evaluation.benchmark import Benchmark
from megatron_sphinx.evaluation.questions import digest_of, questions_of, samples_of
from megatron_sphinx.evaluation.ranking import RankingWork, rank_questions
from megatron_sphinx.evaluation.samples import Protocol, Sample
from megatron_sphinx.generation.answering import Answers, Load, Scorer
from megatron_sphinx.generation.requests import Sampling
from megatron_sphinx.parsing import ParseError, read_json
from megatron_sphinx.prepare.workers import write_json
from megatron_sphinx.serving.batch import BatchReport, How, answer_questions, model_settings
from megatron_sphinx.serving.questions import Asking

_ANSWER_SHARE = 4  # of what a model takes, an answer may be at most one part of so many
ANSWERS, SETTINGS, RUNS = "answers.jsonl", "evaluation.json", "runs.jsonl"


@dataclass(frozen=True)
class Wanted:
    """What an evaluation is of, and by whose rules.

    Attributes:
        data: the folder that holds one for each benchmark.
        protocol: whose rules are followed.
        sampling: how answers are drawn; how long they may be is the benchmark's.
        limit: how many of the first samples of each benchmark are asked; None for all.
        by_ranking: whether the likeliest choice is the answer, instead of what is generated.
    """

    data: Path
    protocol: Protocol
    sampling: Sampling
    limit: int | None = None
    by_ranking: bool = False

    @property
    def way(self) -> dict[str, bool]:
        """Return what settings say of how answers are found; nothing where they are generated."""
        return {"by_ranking": True} if self.by_ranking else {}


@dataclass(frozen=True)
class Answering:
    """What became of the questions of a benchmark, and what that took.

    Attributes:
        report: how many were answered, and how many could not be asked.
        seconds: that it took, this time.
        prompt_tokens: of the prompts that were computed this time.
        hit_tokens: how many of these were in the prefix cache.
        ranking: what ranking took; None where answers are generated.
    """

    report: BatchReport
    seconds: float
    prompt_tokens: int
    hit_tokens: int
    ranking: RankingWork | None = None

    def __str__(self) -> str:
        before = f", {self.report.before} of them from before" if self.report.before else ""
        share = self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        hits = f"; {share:.1%} of {self.prompt_tokens} prompt tokens were in the prefix cache" if share else ""
        ranked = f"; {self.ranking}" if self.ranking and self.ranking.pictures else ""
        return (
            f"{self.report.answered} answers, {self.report.errors} that could not be asked{before}, in "
            f"{self.seconds:.0f} s{hits}{ranked}"
        )


def settings_of(
    model: Mapping[str, Any], benchmark: Benchmark, samples: Sequence[Sample], wanted: Wanted
) -> dict[str, Any]:
    """Return what the answers of a benchmark follow from, as plain values.

    Args:
        model: what tells it from others, as `evaluation.json` has it.
        benchmark: what is asked.
        samples: of the benchmark.
        wanted: by whose rules.
    """
    return {
        "model": dict(model),
        "benchmark": benchmark.name,
        "protocol": wanted.protocol.value,
        "limit": wanted.limit,
        "questions": len(samples),
        "digest": digest_of(benchmark, samples, wanted.protocol, wanted.data),
        "sampling": asdict(_sampling_of(model, benchmark, wanted)),
        **wanted.way,
    }


def _sampling_of(model: Mapping[str, Any], benchmark: Benchmark, wanted: Wanted) -> Sampling:
    """Return how answers are drawn; they are not longer than a quarter of what the model takes."""
    most = max(1, model["positions"] // _ANSWER_SHARE)
    return replace(wanted.sampling, max_new_tokens=min(benchmark.max_new_tokens, most))


def agree(folder: Path, answers: Answers, model: Path, wanted: Wanted) -> dict[str, Any]:
    """Compare a folder's settings with those of a run into it, or write them down where it has none.

    Returns:
        What tells the model from others.

    Raises:
        DataError: the folder holds answers of another model, or by another protocol or sampling, or cannot be written.
    """
    drawn = {name: value for name, value in asdict(wanted.sampling).items() if name != "max_new_tokens"}
    told = {**model_settings(answers, model), "padding": answers.padding}
    current = {"model": told, "protocol": wanted.protocol.value, "limit": wanted.limit, "sampling": drawn}
    current |= wanted.way
    current = json.loads(json.dumps(current))
    place = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            write_json(place, current)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); {remedy_of(error)}") from error
    for key, one, other in differences(settings_in(folder), current):
        raise DataError(
            f"{folder}: was begun with {key}={shortened(one, 80)}, not {shortened(other, 80)}; give another --output"
        )
    return told


def settings_in(folder: Path) -> dict[str, Any]:
    """Read what the answers in a folder follow from.

    Raises:
        DataError: it holds no settings, or damaged ones.
    """
    try:
        made = read_json(folder / SETTINGS)
    except (ParseError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{folder / SETTINGS}: cannot be read ({reason}); give a folder of evaluate") from error
    if not isinstance(made, dict) or not isinstance(made.get("model"), dict):
        raise DataError(f"{folder / SETTINGS}: does not say which model answered; give a folder of evaluate")
    return made


def answer_benchmark(
    answers: Scorer,
    told: Mapping[str, Any],
    benchmark: Benchmark,
    wanted: Wanted,
    folder: Path,
    *,
    in_flight: int = 64,
    show: bool = False,
) -> Answering:
    """Answer what a benchmark asks that is not answered yet; questions about one picture are asked behind each other.

    Args:
        answers: the model.
        told: what tells it from others.
        benchmark: what is asked.
        wanted: by whose rules.
        folder: of the evaluation; the answers come into one inside it that has the benchmark's name.
        in_flight: how many questions the model has at a time.
        show: whether there is a progress bar.

    Raises:
        DataError: files of the benchmark are missing or wrong, or answers are there that follow from something else.
        SphinxError: the model ended.
    """
    samples = samples_of(benchmark, wanted.data, wanted.limit)
    settings = settings_of(told, benchmark, samples, wanted)
    how = How(
        Asking(follow_links=True),
        _sampling_of(told, benchmark, wanted),
        in_flight,
        show,
        title=benchmark.name,
        has_size=True,
    )
    target = folder / benchmark.name / ANSWERS
    before, begin = answers.load(), time.monotonic()
    ranking = None
    if wanted.by_ranking:
        report, ranking = rank_questions(answers, settings, benchmark, samples, wanted.protocol, target, how)
    else:
        report = answer_questions(
            answers,
            settings,
            lambda: questions_of(benchmark, samples, wanted.protocol),
            lambda: len(samples),
            target,
            how,
        )
    done = replace(_since(before, answers.load(), report, time.monotonic() - begin), ranking=ranking)
    if done.prompt_tokens:
        with suppress(OSError), (target.parent / RUNS).open("a") as file:
            told_times = {"seconds": done.seconds, "prompt_tokens": done.prompt_tokens, "hit_tokens": done.hit_tokens}
            told_work = asdict(ranking) if ranking else {}
            file.write(json.dumps({**asdict(report), **told_times, **told_work}) + "\n")
    return done


def _since(before: Load, after: Load, report: BatchReport, seconds: float) -> Answering:
    """Return what was done between two looks at a model."""
    prompts, hits = after.prompt_tokens - before.prompt_tokens, after.hit_tokens - before.hit_tokens
    return Answering(report, round(seconds, 2), prompts, hits)
