"""What a program needs to evaluate a run by itself: a job of one process."""

import os

from megatron_sphinx.config import Config
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelLayout
from megatron_sphinx.parallel.place import find_place
from megatron_sphinx.run.job import RankContext, join, open_run


def open_alone(config: Config) -> RankContext:
    """Open the data of a run in a job of this one process, to evaluate in: nothing is trained, nothing is taken."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    _, world = find_place()
    platform = join(config.run.device, config.run.timeout)
    layout = ParallelLayout(world=world, config=config.parallel)
    return open_run(config, platform, ProcessGroups.create(layout, platform.backend))
