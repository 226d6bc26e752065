"""What a benchmark is: a record of its files, how they are read, what is asked, and how answers are judged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sphinx.evaluation.samples import Answered, Judged, Protocol, Sample, Verdict


@dataclass(frozen=True)
class Metric:
    """How answers are judged, and what is computed of the verdicts.

    Attributes:
        name: what tables call it.
        judge: returns a verdict for each answer, in their order, by the rules of a protocol.
        figures: computes figures by name, the headline first, in the unit that tables have (mostly percent). It is
            called again and again with answers drawn with repetition, for intervals, so it is a function of the
            verdicts and of what samples say of themselves.
    """

    name: str
    judge: Callable[[Sequence[Answered], Protocol], list[Verdict]]
    figures: Callable[[Sequence[Judged]], Mapping[str, float]]


@dataclass(frozen=True)
class OfficialFile:
    """A file or folder of a benchmark as its authors distribute it.

    Attributes:
        path: relative to the folder of the benchmark; it may hold `*` where names vary.
        where: how to get it: the page where its authors offer it.
    """

    path: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark of the papers, or another one.

    Attributes:
        name: what the command line calls it, in lower case with underscores: the folder in --data has this name, too.
        title: what tables call it.
        files: what must be there.
        read: yields the samples of the folder that holds the files; raises DataError for another layout.
        prompts: what is asked by each protocol, with places in braces that `Sample.fields` fill; a protocol that is
            missing has that of the paper.
        max_new_tokens: of an answer.
        metric: how answers are judged.
        answer_prefix: what the model's answer is made to begin with, by protocol; mostly nothing.
        is_judged: whether answers are judged by another model, in a step of its own.
        submission: makes what the benchmark's server takes, name of a file to content; None where there is no server.
        table: its column in the papers' tables, as `evaluation/papers.yaml` calls it; empty where there is none.
        figure: which figure of the metric stands there; empty for its headline.
    """

    name: str
    title: str
    files: tuple[OfficialFile, ...]
    read: Callable[[Path], Iterable[Sample]]
    prompts: Mapping[Protocol, str]
    max_new_tokens: int
    metric: Metric
    answer_prefix: Mapping[Protocol, str] = field(default_factory=dict)
    is_judged: bool = False
    submission: Callable[[Sequence[Answered]], Mapping[str, str]] | None = None
    table: str = ""
    figure: str = ""
