"""What a model is asked while its MoE experts are looked at: files of questions, or benchmarks."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_sphinx.errors import DataError
from megatron_sphinx.evaluation.benchmark import Benchmark
from megatron_sphinx.evaluation.benchmarks.registry import named, names
from megatron_sphinx.evaluation.questions import questions_of, samples_of
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.serving import questions as files
from megatron_sphinx.serving.questions import Asking, Question
from megatron_sphinx.serving.rows import sources_of


@dataclass(frozen=True)
class DataSet:
    """Questions under a name.

    Attributes:
        name: what the report calls it.
        path: a file or folder of questions; of a benchmark, the folder that holds one for each benchmark.
        benchmark: the benchmark that it is of; None for a file.
    """

    name: str
    path: Path
    benchmark: Benchmark | None = None

    @classmethod
    def of(cls, given: str) -> "DataSet":
        """Read what a user gives: [NAME=]PATH, where NAME may be that of a benchmark and PATH the folder of its folder.

        Raises:
            DataError: there is nothing at the path, or files of the benchmark are missing.
        """
        name, sign, place = given.rpartition("=")
        path = Path(place)
        if not path.exists():
            raise DataError(f"--data={given}: {path}: no such file or folder; give [NAME=]PATH")
        if sign and name in names() and path.is_dir():
            benchmark = named(name)
            next(iter(benchmark.samples(path)), None)  # which names files that are missing
            return cls(name, path, benchmark)
        return cls(name or path.stem, path)

    def questions(self, asking: Asking, limit: int | None) -> Iterator[Question]:
        """Yield the questions of the data set.

        Args:
            asking: how rows of files become questions.
            limit: how many; None for all.

        Raises:
            DataError: it cannot be read.
        """
        if self.benchmark is not None:
            samples = samples_of(self.benchmark, self.path, limit)
            return questions_of(self.benchmark, samples, Protocol.PAPER)
        return islice(files.questions_of(sources_of([self.path]), asking), limit)
