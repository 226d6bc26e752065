"""Evaluate a model on benchmarks of the papers, and report its numbers beside theirs.

    megatron-sphinx evaluate pope gqa --data benchmarks --model runs/sphinx --output results --paper sphinx-1k
    megatron-sphinx evaluate --list --data benchmarks
    megatron-sphinx evaluate --report-only --data benchmarks --output results

NAMES are benchmarks, or `all` for those whose files are there; --list says which are known, and what of their official
files is missing. --data holds a folder for each, with the files as their authors distribute them.

Each benchmark gets a folder in --output, with its answers, a line each, what made them, files for its server, and a
table for VLMEvalKit; report.md, report.html and report.json stand beside these. Killed, the same command goes on where
it was, and ends with the same files; with another model, protocol or sampling it is refused. What cannot be asked, such
as a damaged picture, is listed, and scores say of how many of how many questions they are.

Answers that a model has to judge wait for `megatron-sphinx judge`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sphinx.cli.command import add_model, check_experts, model_options
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.evaluation.samples import Protocol
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.ranges import Range, check_range, check_ranges

if TYPE_CHECKING:
    from megatron_sphinx.evaluation.benchmark import Benchmark
    from megatron_sphinx.evaluation.run import Wanted

_ALL = "all"
_COUNT = Range(least=1, most=2**31)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks, or all")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folders of the benchmarks' files")
    parser.add_argument("--output", type=Path, metavar="DIR", help="answers and report")
    parser.add_argument(
        "--list", action="store_true", help="say which benchmarks there are, and what of them is missing"
    )
    parser.add_argument("--report-only", action="store_true", help="report the answers that are there; ask nothing")
    parser.add_argument("--paper", metavar="NAME", help="whose numbers to show, such as sphinx-1k or sphinx-moe")
    rules = parser.add_argument_group("how benchmarks are asked")
    rules.add_argument(
        "--protocol", choices=[one.value for one in Protocol], default=Protocol.PAPER.value,
        help="whose rules are followed where they differ; default: paper",
    )  # fmt: skip
    rules.add_argument("--limit", type=int, metavar="N", help="the first N questions of each; the report says so")
    rules.add_argument("--temperature", type=float, help="default: 0; 0.1 for --protocol accessory")
    rules.add_argument("--top-p", type=float, help="default: 1; 0.75 for --protocol accessory")
    rules.add_argument("--seed", type=int, help="default: 0; 1 for --protocol accessory")
    add_model(parser, is_option=True)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    if not args.data.is_dir():
        raise DataError(f"--data={args.data}: no such folder; give the one that holds a folder for each benchmark")
    if args.list:
        return _list(args.data)
    if args.output is None:
        raise ConfigError("--output: is not given; name the folder for answers and report")
    if args.paper is not None:
        from megatron_sphinx.evaluation.papers import numbers_of

        numbers_of(args.paper)  # which refuses a name
    if not args.report_only:
        _answer(args)
    return report(args.output, args.data, args.paper)


def report(folder: Path, data: Path, paper: str | None) -> int:
    """Write the report of a folder, and print its headlines; the exit status.

    Args:
        folder: of the evaluation.
        data: the folder that holds one for each benchmark.
        paper: whose numbers stand beside.
    """
    from megatron_sphinx.evaluation.benchmarks.registry import named, names
    from megatron_sphinx.evaluation.papers import numbers_of
    from megatron_sphinx.evaluation.report import write_report

    known = {name: named(name) for name in names()}
    written = write_report(folder, data, known, None if paper is None else (paper, numbers_of(paper)))
    for line in written.lines():
        print(line)
    print(f"{written.path}")
    return 0


def _list(data: Path) -> int:
    """Print all benchmarks, and what of their files is missing."""
    from megatron_sphinx.evaluation.benchmarks.registry import named, names

    for name in names():
        benchmark = named(name)
        missing = benchmark.missing_in(data)
        lacks = "; ".join(f"{file.path} ({file.where})" for file in missing)
        state = f"missing in {benchmark.folder_in(data)}: {lacks}" if missing else "is there"
        print(f"{name:24} {benchmark.title}: {state}")
    return 0


def _answer(args: argparse.Namespace) -> None:
    """Have the model answer; all that can be wrong with files and arguments is said before it is loaded."""
    if args.model is None:
        raise ConfigError("--model: is not given; name a checkpoint or a run's folder")
    if not args.model.exists():
        raise ConfigError(f"--model={args.model}: no such file or folder; name a checkpoint or a run's folder")
    check_experts(args)
    if args.limit is not None:
        check_range(args.limit, _COUNT, "--limit")
    benchmarks = _benchmarks(args.names, args.data)
    wanted = _wanted(args)
    from megatron_sphinx.evaluation.questions import samples_of
    from megatron_sphinx.evaluation.run import agree, answer_benchmark
    from megatron_sphinx.serving.model import load

    for benchmark in benchmarks:
        samples_of(benchmark, args.data, args.limit)
    with load(args.model, **model_options(args)) as model:
        told = agree(args.output, model, args.model, wanted)
        for benchmark in benchmarks:
            done = answer_benchmark(
                model, told, benchmark, wanted, args.output,
                in_flight=Limits.sequences * model.replicas, show=True,
            )  # fmt: skip
            print(f"{benchmark.name}: {done}")


def _wanted(args: argparse.Namespace) -> Wanted:
    """Return what the arguments ask for.

    Raises:
        ConfigError: a number is out of its range.
    """
    from megatron_sphinx.evaluation.questions import sampling_of_protocol
    from megatron_sphinx.evaluation.run import Wanted

    protocol = Protocol(args.protocol)
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "seed")}
    drawn = {name: value for name, value in given.items() if value is not None}
    sampling = replace(sampling_of_protocol(protocol), **drawn)
    check_ranges(sampling, "sampling.")
    return Wanted(args.data, protocol, sampling, args.limit)


def _benchmarks(given: Sequence[str], data: Path) -> list[Benchmark]:
    """Return the benchmarks of some names, each once.

    Raises:
        ConfigError: a name is unknown, or none is given.
        DataError: `all` is given, and there are no files of any.
    """
    from megatron_sphinx.evaluation.benchmarks.registry import named, names

    if not given:
        raise ConfigError("NAME: no benchmark is given; give some, or all; see evaluate --list")
    if list(given) == [_ALL]:
        found = [one for one in map(named, names()) if not one.missing_in(data)]
        if not found:
            raise DataError(f"--data={data}: holds all files of no benchmark; see evaluate --list")
        return found
    return [named(name) for name in dict.fromkeys(given)]
