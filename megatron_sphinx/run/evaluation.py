"""What a program needs to evaluate a run by itself: a job of one process."""

import os

from megatron_sphinx.config import Config
from megatron_sphinx.device import Platform
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.parallel.place import find_place
from megatron_sphinx.run.job import RankContext, join, open_run


def open_alone(config: Config) -> RankContext:
    """Open the data of a run in a job of this one process, to evaluate in: nothing is trained, nothing is taken."""
    groups, platform = join_alone(config.run.device, config.run.timeout, config.parallel)
    return open_run(config, platform, groups)


def join_alone(
    device: str, timeout: float = 1800.0, parallel: ParallelConfig | None = None
) -> tuple[ProcessGroups, Platform]:
    """Make a job of this one process.

    Args:
        device: auto, cpu or cuda.
        timeout: seconds until what hangs is given up.
        parallel: how it would be divided; it has one rank.
    """
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    _, world = find_place()
    platform = join(device, timeout)
    layout = ParallelLayout(world=world, config=parallel or ParallelConfig())
    return ProcessGroups.create(layout, platform.backend), platform
