"""What a benchmark is: a record of its files, how they are read, what is asked, and how answers are judged."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sphinx.errors import DataError
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
        path: relative to the folder of the benchmark; it may hold `*` where names vary, and several paths
            with ` or ` between them, of which one is enough.
        where: how to get it: the page where its authors offer it.
        is_needed: whether the benchmark cannot be read without it.
    """

    path: str
    where: str
    is_needed: bool = True

    def is_in(self, folder: Path) -> bool:
        """Say whether it is in a folder, in one of its forms."""
        forms = self.path.split(" or ")
        return any(any(folder.glob(form)) if "*" in form else (folder / form).exists() for form in forms)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark of the papers, or another one.

    Attributes:
        name: what the command line calls it, in lower case with underscores.
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
        figure: which figure of the metric stands there; empty for its headline. The paper's number of any other figure
            is in the column that has this one's name, a space and the name of the figure.
        sentence: the answer that names a choice of a sample, with {choice} in it, where choices can be ranked by how
            likely that is; empty where they cannot.
        folder: the name of its folder in --data, which splits of one benchmark share; empty where it is its own name.
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
    sentence: str = ""
    folder: str = ""

    def folder_in(self, data: Path) -> Path:
        """Return the folder of its files in the folder that the user gives."""
        return data / (self.folder or self.name)

    def missing_in(self, data: Path) -> list[OfficialFile]:
        """Return the files that are needed and not there."""
        return [file for file in self.files if file.is_needed and not file.is_in(self.folder_in(data))]

    def samples(self, data: Path) -> Iterator[Sample]:
        """Yield the samples of its files.

        Args:
            data: the folder that holds one for each benchmark.

        Raises:
            DataError: a file is missing, or has another layout.
        """
        if missing := self.missing_in(data):
            lacks = "; ".join(f"{file.path} ({file.where})" for file in missing)
            raise DataError(f"{self.folder_in(data)}: {self.name} lacks {lacks}; get it and put it there")
        yield from self.read(self.folder_in(data))
