"""Points of a sweep: each is `train` on the same ranks with other values, run in turn."""

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

import yaml

from megatron_sphinx import config as configuration
from megatron_sphinx.benchmark import synthetic
from megatron_sphinx.benchmark.environment import environment
from megatron_sphinx.benchmark.observer import PROFILED
from megatron_sphinx.benchmark.summary import MeasuredRun, summary
from megatron_sphinx.config import Config
from megatron_sphinx.console import say
from megatron_sphinx.errors import ConfigError, FolderError, SphinxError
from megatron_sphinx.parallel.launch import run_launcher
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.training import metrics

PLAIN = "as configured"  # the one point of no sweep
_SAID = 20  # lines of a failed run's standard error that are kept


class BenchmarkError(SphinxError):
    """A measured run did not end well, or cannot be compared with the others."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How every point is measured.

    Attributes:
        config: the configuration.
        overrides: key=value overrides of all points.
        ranks: of each run.
        steps: measured steps of each run.
        warmup: steps before them.
        repeats: runs of each point.
        folder: what is written goes here; on a file system that all ranks see.
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
    """A point on its way: its configuration and runs, and what went wrong, if anything did."""

    name: str
    overrides: Sequence[str]
    config: Config | None = None
    runs: list[MeasuredRun] = field(default_factory=list)
    error: str = ""

    def fail(self, error: SphinxError) -> None:
        """Note what went wrong, and say so."""
        self.error = str(error)
        say(f"{self.name} failed: {self.error.splitlines()[0]}")


def points_of(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """Names and overrides of every combination of the values of `key=a,b,c`.

    Raises:
        ConfigError: a sweep is not of that form, or there are two of one key.
    """
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, separator, text = sweep.partition("=")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = []
        if not separator or not key or not values or key in axes:
            raise ConfigError(f"--sweep {sweep}: must read key.path=value,value,... with another key each time")
        axes[key] = [json.dumps(value) for value in values]
    points = {}
    for chosen in product(*axes.values()):
        overrides = [f"{key}={value}" for key, value in zip(axes, chosen, strict=True)]
        points[" ".join(overrides).replace('"', "") or PLAIN] = overrides
    return points


def measure(how: Measurement, points: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Run the points in turn (A, B, A, B, ...), since machines drift; medians of the steps of each.

    A point that fails is not run again; the others are.

    Args:
        how: what holds for all points.
        points: by name, the overrides of each.

    Returns:
        A point each, as it is written to `points/<name>.json` in the folder; one that failed has an `error`.

    Raises:
        FolderError: the folder cannot be made.
    """
    try:
        (how.folder / "points").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--output={how.folder}: cannot be made ({error.strerror}); give another folder") from error
    about = environment()
    todo = [_Point(name, own) for name, own in points.items()]
    for point in todo:
        try:
            point.config = _config(how, point.overrides)
        except SphinxError as error:
            point.fail(error)
    for repeat in range(how.repeats):
        for point in todo:
            if not point.error:
                _repeat(how, point, repeat)
    return [_written(how, point, about) for point in todo]


def _repeat(how: Measurement, point: _Point, repeat: int) -> None:
    """Run a point once more."""
    assert point.config is not None
    try:
        run = _run(how, point.config, how.folder / "runs" / f"{file_name(point.name)}_{repeat + 1}")
    except BenchmarkError as error:
        point.fail(error)
        return
    point.runs.append(run)
    speed, seconds = (median(line[name] for line in run.lines) for name in ("tokens_per_second", "step_seconds"))
    say(f"run {repeat + 1}/{how.repeats} of {point.name}: {speed:.0f} tokens/s, {seconds:.3f} s/step")


def _written(how: Measurement, point: _Point, about: dict[str, Any]) -> dict[str, Any]:
    """What a point came to, as it is written to its file."""
    found: dict[str, Any] = {"name": point.name, "overrides": list(point.overrides), "ranks": how.ranks}
    found |= {key: getattr(how, key) for key in ("steps", "warmup", "repeats", "launcher", "is_synthetic")}
    found |= {"environment": about, "config": asdict(point.config) if point.config else None}
    if point.error or not point.config:
        found["error"] = point.error
    else:
        found |= summary(point.config, point.runs)
    (how.folder / "points" / f"{file_name(point.name)}.json").write_text(json.dumps(found, indent=1))
    return found


def compare(how: Measurement, points: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """The same for points that must all be measured, on the same samples; by name.

    Raises:
        BenchmarkError: a run failed, or did not train on the samples that the others did.
    """
    found = {point["name"]: point for point in measure(how, points)}
    first = next(iter(found.values()))
    for name, point in found.items():
        if "error" in point:
            raise BenchmarkError(f"{name}: {point['error']}")
        if point["samples"] != first["samples"]:
            raise BenchmarkError(f"{name}: trained on other samples than {first['name']}; give it the same data")
    return found


def ratios(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many times as many tokens a second the first point takes as each other one that has the same samples."""
    first, *others = points
    return {
        point["name"]: first["tokens_per_second"] / point["tokens_per_second"]
        for point in others
        if "error" not in first and "error" not in point and point["samples"] == first["samples"]
    }


def file_name(name: str) -> str:
    """A point's name as a file's; different names stay different."""
    plain = re.sub(r"[^\w.=,-]+", "_", name)
    return plain if plain == name else f"{plain[:120]}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _config(how: Measurement, own: Sequence[str]) -> Config:
    """A point's configuration, with synthetic data where that is asked for; checked against the ranks."""
    config = configuration.load(how.config, [*(synthetic.PATHS if how.is_synthetic else ()), *how.overrides, *own])
    ParallelLayout(world=how.ranks, config=config.parallel)
    return synthetic.prepared(config, how.folder / "synthetic") if how.is_synthetic else config


def _run(how: Measurement, config: Config, folder: Path) -> MeasuredRun:
    """One run of a point in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = folder / "point.yaml"
    given.write_text(config.to_yaml())
    torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone --nproc-per-node {how.ranks}"
    command = shlex.split(how.launcher or f"{torchrun} --no-python")
    command += [sys.executable, "-m", "megatron_sphinx", "measure", str(given.resolve())]
    command += [f"run.folder={folder.resolve()}", f"training.steps={how.warmup + how.steps + PROFILED}"]
    command += ["training.epochs=0", "checkpoint.resume=none"]
    command += ["--steps", str(how.steps), "--warmup", str(how.warmup)]
    with (folder / "stdout.txt").open("w") as out, (folder / "stderr.txt").open("w") as error:
        try:
            status = run_launcher(command, stdout=out, stderr=error)
        except OSError as failed:
            raise BenchmarkError(
                f"--launcher={how.launcher}: {failed.strerror}; give a command to begin with"
            ) from failed
    if status:
        raise BenchmarkError(f"ended with status {status}\n{_last_words(folder / 'stderr.txt')}\n{shlex.join(command)}")
    ranks = [json.loads(path.read_text()) for path in (folder / "ranks").glob("*.json")]
    if len(ranks) != how.ranks:
        raise BenchmarkError(
            f"--launcher={how.launcher}: started {len(ranks)} ranks, not --ranks={how.ranks}; let both agree"
        )
    lines = metrics.read(folder / "metrics.jsonl")[how.warmup : how.warmup + how.steps]
    return MeasuredRun(lines, sorted(ranks, key=lambda rank: int(rank["rank"])))


def _last_words(path: Path) -> str:
    """What a failed run said: the line that it ended with, or else the last of its standard error before torchrun's."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if own := [line for line in lines if line.startswith("megatron-sphinx ")]:
        return own[0]
    of_ranks = list(takewhile(lambda line: "torch/distributed/elastic/" not in line, lines))
    return "\n".join((of_ranks or lines)[-_SAID:])
