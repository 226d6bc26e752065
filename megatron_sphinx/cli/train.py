"""Train until the configured number of steps, going on from the newest checkpoint.

    megatron-sphinx train CONFIG [key=value ...] [--check [--ranks N]]

Started by torchrun or srun this is one rank of a job, alone it is the only one. Exits with 0 when it is done, with 75
where a signal came and the state is saved: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sphinx.cli.command import add_configuration

if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron_sphinx.run.observer import Observer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a parser take the command's arguments."""
    add_configuration(parser)
    parser.add_argument("--profile", action="store_true", help="print how long each phase of the start takes")
    parser.add_argument(
        "--check", action="store_true", help="look at all that a start looks at, in one process; nothing is started"
    )
    parser.add_argument("--ranks", type=int, help="with --check: ranks of the job; default: one replica")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    if args.check:
        from megatron_sphinx import config as configuration

        config = configuration.load(args.config, args.overrides)
        from megatron_sphinx.run.check import check

        check(config, args.ranks)
        return 0
    return run_rank(args, is_profiled=args.profile)


def run_rank(
    args: argparse.Namespace, make_observer: Callable[[], Observer] | None = None, *, is_profiled: bool = False
) -> int:
    """Run one rank of a job; the exit status of its process.

    What must hold from the rank's first moment comes before the imports, which take seconds: a signal that arrives
    during those is heard.

    Args:
        args: configuration and overrides.
        make_observer: makes what watches the rank.
        is_profiled: whether the first rank prints how long each phase of the start took.
    """
    from megatron_sphinx import console
    from megatron_sphinx.liveness.stop import StopSignal

    console.reserve_streams()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else pages of C++ frames where another rank is gone
    with StopSignal() as stop:
        from megatron_sphinx.parallel.place import find_place

        place = find_place()
        from megatron_sphinx import config as configuration

        config = configuration.load(args.config, args.overrides)
        with console.enduring(Path(config.run.folder) / "log.txt"):
            from megatron_sphinx.parallel.meeting import meet

            store = meet(place, config.run.storage_timeout)  # before the imports that take longest
            from megatron_sphinx.run import train
            from megatron_sphinx.sizing.automatic import fit

            observer = make_observer() if make_observer else None
            return train.train(config, stop, observer, fit, is_profiled=is_profiled, store=store)
