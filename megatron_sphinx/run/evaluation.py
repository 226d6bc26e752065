"""What a program needs to evaluate a run by itself: a job of one process, and the newest weights of the run."""

import os

from torch import Tensor

from megatron_sphinx.checkpoint.store import load_weights
from megatron_sphinx.config import Config
from megatron_sphinx.device import Platform
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.parallel.place import find_place
from megatron_sphinx.run.job import RankContext, join, open_run
from megatron_sphinx.run.provenance import require_trained_as


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


def newest_weights(context: RankContext, encoders: FrozenEncoders) -> dict[str, Tensor]:
    """Read the trained fp32 weights of the newest checkpoint of the run folder, saved in any layout.

    Args:
        context: of the run's configuration.
        encoders: that the weights are used with.

    Raises:
        CheckpointError: there is none, or it was trained with another model, tokenizer or other encoders.
    """
    tokenizer = context.sources.tokenizer.identity.sha256
    require_trained_as(context.folder, context.config, tokenizer, encoders.sha256)
    return load_weights(context.folder / "checkpoints")
