"""All benchmarks by name; a new one is a record in the file of its family."""

from megatron_sphinx.errors import ConfigError, nearest
from megatron_sphinx.evaluation.benchmark import Benchmark
from megatron_sphinx.evaluation.benchmarks import (
    documents,
    mathematics,
    options,
    regions,
    short_answers,
    videos,
    whole_pictures,
    yes_or_no,
)

_FAMILIES = (short_answers, documents, options, yes_or_no, mathematics, whole_pictures, regions, videos)
_BY_NAME: dict[str, Benchmark] = {benchmark.name: benchmark for family in _FAMILIES for benchmark in family.BENCHMARKS}


def names() -> list[str]:
    """Return the names of all benchmarks, those of a family together."""
    return list(_BY_NAME)


def named(name: str) -> Benchmark:
    """Return a benchmark by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in _BY_NAME:
        raise ConfigError(f"{name}: is no benchmark; {nearest(name, names())}")
    return _BY_NAME[name]
