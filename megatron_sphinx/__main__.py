"""Pretrain SPHINX models with megatron-core and DeepSpeed."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sphinx import config as configuration
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.parallel.layout import ParallelLayout


def train(args: argparse.Namespace) -> int:
    """train until the configured number of steps, going on from the newest checkpoint"""
    config = configuration.load(args.config, args.overrides)
    from megatron_sphinx import run

    return run.train(config)


def plan(args: argparse.Namespace) -> int:
    """print sizes of the model and the run, or the composition of a step, without starting anything"""
    config = configuration.load(args.config, args.overrides)
    layout = ParallelLayout(world=args.ranks or config.parallel.smallest_world, config=config.parallel)
    from megatron_sphinx import planning

    if args.step is None:
        found = planning.sizes(config, layout)
        print(json.dumps(found, indent=1) if args.json else planning.table(found))
        return 0
    for line in planning.step(config, layout, args.step):
        print(json.dumps(line))
    return 0


def benchmark(args: argparse.Namespace) -> int:
    """run the encoder stage and colocated encoders in turn on the same ranks of this machine, and compare them"""
    config = configuration.load(args.config, args.overrides)
    from megatron_sphinx import benchmark as side_by_side

    result = side_by_side.compare_layouts(
        args.config,
        args.overrides,
        ranks=args.ranks,
        encoder=config.parallel.encoder or 1,
        steps=args.steps,
        warmup=args.warmup,
        repeats=args.repeats,
    )
    print(side_by_side.table(result))
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-sphinx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    options = {
        train: {},
        plan: {"--ranks": "ranks of the job (default: one replica)", "--step": "a step to print the composition of"},
        benchmark: {
            "--ranks": "ranks of each run",
            "--steps": "measured steps of each run",
            "--warmup": "steps before them",
            "--repeats": "runs of each layout",
        },
    }
    defaults = {"--steps": 20, "--warmup": 5, "--repeats": 2}
    for work, flags in options.items():
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.add_argument("config", type=Path, help="YAML file, e.g. examples/demo.yaml, or a preset's name")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.tensor=2")
        for flag, text in flags.items():
            is_required = work is benchmark and flag == "--ranks"
            command.add_argument(flag, type=int, default=defaults.get(flag), help=text, required=is_required)
        if work is plan:
            command.add_argument("--json", action="store_true", help="sizes as JSON")
        command.set_defaults(work=work)
    return parser


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
        if os.environ.get("RANK", "0") == "0":
            print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return error.exit_status
    return status


if __name__ == "__main__":
    sys.exit(main())
