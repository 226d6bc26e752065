"""Pretrain SPHINX models with megatron-core and DeepSpeed."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sphinx.errors import SphinxError

if TYPE_CHECKING:  # a rank hears of signals before anything that takes time is imported
    from megatron_sphinx.config import Config
    from megatron_sphinx.parallel.layout import ParallelLayout


def train(args: argparse.Namespace) -> int:
    """train until the configured number of steps, going on from the newest checkpoint"""
    return _train(args)


def config(args: argparse.Namespace) -> int:
    """print the configuration as a run would take it: presets, files and key=value in one, every value spelled out"""
    from megatron_sphinx import config as configuration

    print(configuration.load(args.config, args.overrides).to_yaml(), end="")
    return 0


def plan(args: argparse.Namespace) -> int:
    """print sizes, the composition of a step, or the layouts that fit a cluster, without starting anything"""
    if args.published:
        from megatron_sphinx.sizing import published

        rows = list(published.rows())
        print(json.dumps(rows, indent=1) if args.json else published.table(rows))
        return 0
    if args.config is None:
        raise SphinxError("plan: give a configuration, e.g. examples/demo.yaml or a preset's name, or --published")
    from megatron_sphinx import config as configuration
    from megatron_sphinx.parallel.layout import ParallelLayout

    config = configuration.load(args.config, args.overrides)
    per_node = args.gpus_per_node or args.ranks or config.parallel.smallest_world
    ranks = args.ranks or (args.nodes or 1) * per_node
    if args.calibrate is not None:
        from megatron_sphinx.sizing import calibration

        calibration.calibrate(config, ranks=ranks, target=args.calibrate)
        return 0
    if not args.dry_run and (args.nodes or args.gpu):
        from megatron_sphinx.sizing import layouts

        nodes, kind = args.nodes or 1, args.gpu or "a100-80g"
        only = {"is_json": args.json, "is_as_configured": args.as_configured}
        print(layouts.plan(config, nodes=nodes, ranks_per_node=per_node, kind=kind, **only))
        return 0
    return _plan_layout(args, config, ParallelLayout(world=ranks, config=config.parallel))


def _plan_layout(args: argparse.Namespace, config: "Config", layout: "ParallelLayout") -> int:
    """Print what a run in the configured layout is."""
    if args.dry_run:
        from megatron_sphinx.sizing import dry_run

        counted = dry_run.report(config, layout)
        print(json.dumps(counted, indent=1) if args.json else dry_run.table(counted))
        return 0
    if args.step is not None:
        from megatron_sphinx.sizing import composition

        for line in composition.step(config, layout, args.step):
            print(json.dumps(line))
        return 0
    from megatron_sphinx.sizing import sizes

    found = sizes.sizes(config, layout)
    print(json.dumps(found, indent=1) if args.json else sizes.table(found))
    return 0


def benchmark(args: argparse.Namespace) -> int:
    """measure the configuration, and what sweeps make of it, on real ranks in turn; write points and a report"""
    from megatron_sphinx.benchmark import report, sweep

    how = sweep.Measurement(
        config=args.config, overrides=tuple(args.overrides), ranks=args.ranks, steps=args.steps, warmup=args.warmup,
        repeats=args.repeats, folder=args.output, launcher=args.launcher, is_synthetic=args.synthetic,
    )  # fmt: skip
    points = sweep.measure(how, sweep.points_of(args.sweep))
    ratios = sweep.ratios(points)
    path = report.write(args.output, points, ratios=ratios)
    print(report.text_table(points))
    print(f"the whole report: {path}")
    failed = [point["name"] for point in points if "error" in point]
    speeds = {point["name"]: point.get("tokens_per_second") for point in points}
    print(json.dumps({"ranks": args.ranks, "tokens_per_second": speeds, "failed": failed, "ratios": ratios}))
    return 1 if failed else 0


def measure(args: argparse.Namespace) -> int:
    """one rank of a run that `benchmark` measures, which starts it"""
    return _train(args, is_observed=True)


def _train(args: argparse.Namespace, *, is_observed: bool = False) -> int:
    """Run one rank. What must hold from its first moment comes before the imports that take seconds."""
    from megatron_sphinx import console
    from megatron_sphinx.liveness.stop import StopSignal

    console.reserve_streams()
    with StopSignal() as stop:
        from megatron_sphinx import config as configuration

        config = configuration.load(args.config, args.overrides)
        with console.enduring(Path(config.run.folder) / "log.txt"):
            from megatron_sphinx.run.train import train as train_rank

            if not is_observed:
                return train_rank(config, stop)
            from megatron_sphinx.benchmark.observer import RankObserver

            return train_rank(config, stop, RankObserver(warmup=args.warmup, steps=args.steps))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-sphinx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    works = (train, config, plan, benchmark, measure)
    of = {work: commands.add_parser(work.__name__, help=work.__doc__) for work in works}
    for work, command in of.items():
        file = "YAML file, e.g. examples/demo.yaml, or a preset's name"
        command.add_argument("config", type=Path, help=file, nargs="?" if work is plan else None)  # --published: none
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.tensor=2")
        command.set_defaults(work=work)
    of[plan].add_argument("--ranks", type=int, help="ranks of the job (default: one replica)")
    of[plan].add_argument("--step", type=int, help="a step to print the composition of")
    of[plan].add_argument("--nodes", type=int, help="nodes of a cluster, to print the layouts that fit it")
    of[plan].add_argument("--gpus-per-node", type=int, help="GPUs, or ranks, of each")
    of[plan].add_argument("--gpu", help="a100-80g, h100-80g, ... of sizing/hardware.yaml, or a file")
    of[plan].add_argument("--as-configured", action="store_true", help="only the layout that the file asks for")
    of[plan].add_argument("--calibrate", type=Path, metavar="FILE", help="measure this machine, for --gpu FILE")
    of[plan].add_argument("--published", action="store_true", help="predict runs whose speed was published")
    of[plan].add_argument(
        "--dry-run",
        action="store_true",
        help="take the real step on a rank of each role, in a fake world without memory, and count",
    )
    of[plan].add_argument("--json", action="store_true", help="as JSON")
    for work in (benchmark, measure):
        of[work].add_argument("--steps", type=int, default=20, help="measured steps of each run; default: 20")
        of[work].add_argument("--warmup", type=int, default=5, help="steps before them; default: 5")
    _add_benchmark_flags(of[benchmark])
    return parser


def _add_benchmark_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--ranks", type=int, required=True, help="ranks of each run")
    add("--repeats", type=int, default=2, help="runs of each point, in turn with the others; default: 2")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="key=a,b,c",
        help="values of a key; of several, all combinations",
    )
    add("--synthetic", action="store_true", help="make up the data, draw the encoders' weights")
    add("--output", type=Path, default=Path("runs/benchmark"), help="folder; default: runs/benchmark")
    add(
        "--launcher",
        default="",
        help="what starts a command on all ranks, e.g. 'srun --nodes 2'; default: torchrun here",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 2 the user's mistake, 75 stopped by a signal, 1 anything else."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)  # overrides may also stand behind options
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides += rest
    try:
        status: int = args.work(args)
    except SphinxError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return error.exit_status
    return status


if __name__ == "__main__":
    sys.exit(main())
