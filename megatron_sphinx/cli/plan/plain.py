"""Print what a run is: its sizes, a step, the layouts that fit, a dry run; the flags say which.

    megatron-sphinx plan CONFIG [key=value ...] [--ranks N] [--json]
    megatron-sphinx plan KIND ...

KIND is one of those below, whose own --help tells more. A configuration whose file is called like one is given as a
path: ./sizes. Flags may stand for the kind: --step for step, --nodes or --gpu for layouts, --dry-run, --calibrate and
--published for those of their names; without any of them sizes are printed.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from megatron_sphinx.cli.command import Command, help_line
from megatron_sphinx.cli.plan import calibrate, dry_run, layouts, published, sizes, step
from megatron_sphinx.cli.plan.cluster import add_cluster, add_json
from megatron_sphinx.errors import SphinxError

KINDS: Mapping[str, Command] = {
    "sizes": sizes, "step": step, "layouts": layouts, "dry-run": dry_run, "calibrate": calibrate,
    "published": published,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_cluster(parser, is_optional=True)  # --published needs no configuration
    parser.add_argument("--step", type=int, help="a step to print the composition of")
    layouts.add_kind(parser)
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this machine, for --gpu FILE")
    parser.add_argument("--published", action="store_true", help="predict runs whose speed was published")
    parser.add_argument("--dry-run", action="store_true", help="take the real step without memory, and count")
    add_json(parser)
    lines = "\n".join(f"  {name:11}{help_line(kind)}" for name, kind in KINDS.items())
    parser.epilog = f"kinds:\n{lines}"


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    if not args.published and args.config is None:
        raise SphinxError("plan: give a configuration, e.g. examples/demo.yaml or a preset's name, or --published")
    args.output = args.calibrate
    return KINDS[_kind(args)].run(args)


def _kind(args: argparse.Namespace) -> str:
    """What the flags ask for."""
    if args.published:
        return "published"
    if args.calibrate is not None:
        return "calibrate"
    if args.dry_run:
        return "dry-run"
    if args.nodes or args.gpu:
        return "layouts"
    return "sizes" if args.step is None else "step"
