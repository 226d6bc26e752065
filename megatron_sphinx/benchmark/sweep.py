"""Measures the points of a sweep: each is `train` on the same ranks with other values, and they are run in turn."""

import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product, takewhile
from pathlib import Path
from statistics import median
from typing import Any

from megatron_sphinx import config as configuration
from megatron_sphinx.benchmark import synthetic
from megatron_sphinx.benchmark.environment import environment
from megatron_sphinx.benchmark.summary import PROFILED, MeasuredRun, summary
from megatron_sphinx.config import Config
from megatron_sphinx.console import say
from megatron_sphinx.errors import ConfigError, FolderError, SphinxError
from megatron_sphinx.parallel.launch import run_launcher
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.parsing import ParseError, parse_yaml
from megatron_sphinx.training import metrics

PLAIN = "as configured"  # the name of the only point where nothing is swept
_ERROR_LINES = 20  # of a failed run's standard error that are kept


class BenchmarkError(SphinxError):
    """A measured run did not end well, or cannot be compared with the others."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How the points of a benchmark are measured.

    Attributes:
        config: path of the configuration.
        overrides: `key=value` overrides of all points.
        ranks: ranks of each run.
        steps: measured steps of each run.
        warmup: steps before the measured ones.
        repeats: runs of each point.
        folder: where everything is written; on a file system that all ranks see.
        launcher: what starts a command on all ranks, such as `srun --nodes 2 --ntasks-per-node 8`; without it torchrun
            does on this machine.
        is_synthetic: whether the data is made up and the encoders' weights are drawn.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    ranks: int
    steps: int = 20
    warmup: int = 5
    repeats: int = 2
    folder: Path
    launcher: str = ""
    is_synthetic: bool = False

    def __post_init__(self) -> None:
        for name, least in (("ranks", 1), ("steps", 1), ("warmup", 0), ("repeats", 1)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"--{name}={value}: must be at least {least}")


@dataclass
class _Point:
    """A point that is being measured.

    Attributes:
        name: what it is called.
        overrides: its own `key=value` overrides.
        config: its configuration; None where that is wrong.
        runs: its runs so far.
        error: what went wrong, if anything did.
    """

    name: str
    overrides: Sequence[str]
    config: Config | None = None
    runs: list[MeasuredRun] = field(default_factory=list)
    error: str = ""

    def fail(self, error: SphinxError) -> None:
        """Note what went wrong, so that the point is not run again, and say so."""
        self.error = str(error)
        say(f"{self.name} failed: {self.error.splitlines()[0]}")


def points_of(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """Make a point of every combination of values.

    Args:
        sweeps: keys and their values, as `key.path=value,value`.

    Returns:
        The overrides of each point, by its name.

    Raises:
        ConfigError: a sweep is not of that form, or there are two of one key.
    """
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, separator, text = sweep.partition("=")
        try:
            values = parse_yaml(f"[{text}]")
        except ParseError:
            values = []
        if not separator or not key or not values or key in axes:
            raise ConfigError(f"--sweep {sweep}: must read key.path=value,value,... with another key each time")
        axes[key] = [json.dumps(value) for value in values]
    points = {}
    for values in product(*axes.values()):
        overrides = [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
        points[" ".join(overrides).replace('"', "") or PLAIN] = overrides
    return points


def measure(measurement: Measurement, points: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Run the points in turn (A, B, A, B, ...), since machines drift, and sum up the runs of each.

    A point that fails is not run again; the others are.

    Args:
        measurement: what holds for all points.
        points: the overrides of each point, by its name.

    Returns:
        The points, each as it is written to `points/<name>.json` in the folder; one that failed has an `error`.

    Raises:
        FolderError: the folder cannot be made.
    """
    try:
        (measurement.folder / "points").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"--output={measurement.folder}: cannot be made ({error.strerror}); give another folder"
        ) from error
    made_with = environment()
    pending = [_Point(name, overrides) for name, overrides in points.items()]
    for point in pending:
        try:
            point.config = _config(measurement, point.overrides)
        except SphinxError as error:
            point.fail(error)
    for repeat in range(measurement.repeats):
        for point in pending:
            if not point.error:
                _repeat(measurement, point, repeat)
    return [_write(measurement, point, made_with) for point in pending]


def _repeat(measurement: Measurement, point: _Point, repeat: int) -> None:
    """Run a point once more, as its run number `repeat`, counted from 0."""
    assert point.config is not None
    folder = measurement.folder / "runs" / f"{file_name(point.name)}_{repeat + 1}"
    try:
        run = _run(measurement, point.config, folder)
    except BenchmarkError as error:
        point.fail(error)
        return
    from megatron_sphinx.run.automatic import with_taken  # which imports torch

    point.config = with_taken(point.config, folder)
    point.runs.append(run)
    speed, seconds = (median(line[name] for line in run.lines) for name in ("tokens_per_second", "step_seconds"))
    say(f"run {repeat + 1}/{measurement.repeats} of {point.name}: {speed:.0f} tokens/s, {seconds:.3f} s/step")


def _write(measurement: Measurement, point: _Point, made_with: dict[str, Any]) -> dict[str, Any]:
    """Sum up a point, write it to its file, and return it."""
    values: dict[str, Any] = {"name": point.name, "overrides": list(point.overrides), "ranks": measurement.ranks}
    values |= {key: getattr(measurement, key) for key in ("steps", "warmup", "repeats", "launcher", "is_synthetic")}
    values |= {"environment": made_with, "config": asdict(point.config) if point.config else None}
    if point.error or not point.config:
        values["error"] = point.error
    else:
        values |= summary(point.config, point.runs)
    (measurement.folder / "points" / f"{file_name(point.name)}.json").write_text(json.dumps(values, indent=1))
    return values


def compare(measurement: Measurement, points: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Measure points that must all succeed, and on the same samples.

    Args:
        measurement: what holds for all points.
        points: the overrides of each point, by its name.

    Returns:
        The points, as `measure` returns them, by name.

    Raises:
        BenchmarkError: a run failed, or did not train on the samples that the others did.
    """
    measured = {point["name"]: point for point in measure(measurement, points)}
    first = next(iter(measured.values()))
    for name, point in measured.items():
        if "error" in point:
            raise BenchmarkError(f"{name}: {point['error']}")
        if point["samples"] != first["samples"]:
            raise BenchmarkError(f"{name}: trained on other samples than {first['name']}; give it the same data")
    return measured


def ratios(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Divide the first point's tokens/s by those of each other point that has the same samples."""
    first, *others = points
    return {
        point["name"]: first["tokens_per_second"] / point["tokens_per_second"]
        for point in others
        if "error" not in first and "error" not in point and point["samples"] == first["samples"]
    }


def file_name(name: str) -> str:
    """Turn a point's name into a file's; different names stay different."""
    plain = re.sub(r"[^\w.=,-]+", "_", name)
    return plain if plain == name else f"{plain[:120]}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _config(measurement: Measurement, overrides: Sequence[str]) -> Config:
    """Load a point's configuration, with synthetic data where that is asked for, and check it against the ranks."""
    paths = synthetic.PATHS if measurement.is_synthetic else ()
    config = configuration.load(measurement.config, [*paths, *measurement.overrides, *overrides])
    ParallelLayout(world=measurement.ranks, config=config.parallel)
    return synthetic.prepared(config, measurement.folder / "synthetic") if measurement.is_synthetic else config


def _run(measurement: Measurement, config: Config, folder: Path) -> MeasuredRun:
    """Run a point once in a folder of its own.

    Raises:
        BenchmarkError: the run failed, or had another number of ranks.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = folder / "point.yaml"
    given.write_text(config.to_yaml())
    ranks = measurement.ranks
    torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone --nproc-per-node {ranks}"
    command = shlex.split(measurement.launcher or f"{torchrun} --no-python")
    command += [sys.executable, "-m", "megatron_sphinx", "measure", str(given.resolve())]
    steps = measurement.warmup + measurement.steps
    command += [f"run.folder={folder.resolve()}", f"training.steps={steps + PROFILED}"]
    command += ["training.epochs=0", "checkpoint.resume=none"]
    warmup = min(config.optimizer.warmup_of(config.training.steps), steps)  # of a run that is longer than this one
    command += [f"optimizer.warmup_steps={warmup}", "optimizer.warmup_epochs=0"]
    command += ["--steps", str(measurement.steps), "--warmup", str(measurement.warmup)]
    with (folder / "stdout.txt").open("w") as out, (folder / "stderr.txt").open("w") as error:
        try:
            status = run_launcher(command, stdout=out, stderr=error)
        except OSError as failed:
            raise BenchmarkError(
                f"--launcher={measurement.launcher}: {failed.strerror}; give a command to begin with"
            ) from failed
    if status:
        raise BenchmarkError(f"ended with status {status}\n{_last_words(folder / 'stderr.txt')}\n{shlex.join(command)}")
    observed = [json.loads(path.read_text()) for path in (folder / "ranks").glob("*.json")]
    if len(observed) != ranks:
        raise BenchmarkError(
            f"--launcher={measurement.launcher}: started {len(observed)} ranks, not --ranks={ranks}; let both agree"
        )
    lines = metrics.read(folder / "metrics.jsonl")[measurement.warmup : steps]
    return MeasuredRun(lines, sorted(observed, key=lambda rank: int(rank["rank"])))


def _last_words(path: Path) -> str:
    """Find in a failed run's standard error what it ended with: our own line, or else the last lines of its ranks.

    What torchrun writes after them is left out.
    """
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if own := [line for line in lines if line.startswith("megatron-sphinx ")]:
        return own[0]
    of_ranks = list(takewhile(lambda line: "torch/distributed/elastic/" not in line, lines))
    return "\n".join((of_ranks or lines)[-_ERROR_LINES:])
