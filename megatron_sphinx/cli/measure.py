"""Run one rank of a run that `benchmark` measures, which starts it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_sphinx.cli.benchmark import add_steps
from megatron_sphinx.cli.command import add_configuration
from megatron_sphinx.cli.train import run_rank

if TYPE_CHECKING:
    from megatron_sphinx.benchmark.observer import RankObserver


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_configuration(parser)
    add_steps(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""

    def make_observer() -> RankObserver:
        from megatron_sphinx.benchmark.observer import RankObserver

        return RankObserver(warmup=args.warmup, steps=args.steps)

    return run_rank(args, make_observer)
