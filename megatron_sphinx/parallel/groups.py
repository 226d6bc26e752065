"""The process groups of a job: built once from a layout, then passed to whoever communicates."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.parallel.layout import ParallelLayout, Seat

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of this rank. On an encoder rank all but the world are None.

    Attributes:
        layout: the sizes of all axes.
        seat: where this rank sits on them.
        tensor: ranks that share this rank's matrices.
        data: ranks that hold the same shard for other samples; ZeRO-2 partitions over them.
        model: tensor x pipeline, one whole replica.
        language: every language rank.
        collection: the same groups as megatron-core's layers take them.
    """

    layout: ParallelLayout
    seat: Seat
    tensor: ProcessGroup | None
    data: ProcessGroup | None
    model: ProcessGroup | None
    language: ProcessGroup | None
    collection: ProcessGroupCollection | None

    @classmethod
    def create(cls, layout: ParallelLayout, backend: str, timeout: timedelta | None = None) -> "ProcessGroups":
        """Build every group on the initialised world; each rank calls this once, together.

        A group does not take over the world's `timeout`: without one of its own it waits as long as the backend likes.
        """
        config = layout.config
        grid = HyperCommGrid(
            [config.tensor, 1, layout.data, config.pipeline], ["tp", "cp", "dp", "pp"], rank_offset=0, backend=backend
        )
        axes = {
            "tp": ["tp"],
            "cp": ["cp"],
            "pp": ["pp"],
            "dp": ["dp"],
            "mp": ["tp", "pp"],
            "dp_cp": ["cp", "dp"],
            "tp_cp": ["tp", "cp"],
            "tp_dp_cp": ["tp", "cp", "dp"],
            "language": ["tp", "cp", "dp", "pp"],
        }
        groups = {name: grid.create_pg(dims, timeout=timeout) for name, dims in axes.items()}
        seat = layout.seat(dist.get_rank())
        if seat.encoder is not None:
            return cls(layout, seat, None, None, None, None, None)
        collection = ProcessGroupCollection()
        for name, group in groups.items():
            setattr(collection, name, group)
        collection.embd = collection.pos_embd = None  # input and output embeddings are not tied
        _install_globals(collection)
        return cls(layout, seat, groups["tp"], groups["dp"], groups["mp"], groups["language"], collection)


def _install_globals(collection: ProcessGroupCollection) -> None:
    """Give megatron-core's global state the same groups, for the few places that still read it."""
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = collection.tp
    parallel_state._PIPELINE_MODEL_PARALLEL_GROUP = collection.pp
    parallel_state._CONTEXT_PARALLEL_GROUP = collection.cp
    parallel_state._DATA_PARALLEL_GROUP = collection.dp
    parallel_state._DATA_PARALLEL_GROUP_WITH_CP = collection.dp_cp
    parallel_state._MODEL_PARALLEL_GROUP = collection.mp


def agree(work: Callable[[], T]) -> T:
    """Do something that may fail for the user's reasons, on every rank, and fail on all where one fails.

    Raises:
        SphinxError: the error of the lowest rank that had one, marked as shared.
    """
    result, error = None, None
    try:
        result = work()
    except SphinxError as raised:
        error = raised
    errors: list[SphinxError | None] = [error] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for first in errors:
        if first is not None:
            first.is_shared = True
            raise first
    return cast(T, result)
