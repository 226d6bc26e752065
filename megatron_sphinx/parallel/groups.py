"""The process groups of a job: built once from a layout, then passed to whoever communicates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_sphinx.errors import SphinxError
from megatron_sphinx.parallel.layout import ParallelLayout, Seat

T = TypeVar("T")
_TRANSFER_BLOCKS = 2  # thread blocks of a GPU that one transfer of features may keep busy
# megatron-core names its grids' axes and the groups over them; these are the axes of each group that it asks for.
_DENSE = {
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
_EXPERTS = {"expt_tp": ["expt_tp"], "ep": ["ep"], "expt_dp": ["expt_dp"], "tp_ep": ["expt_tp", "ep"]}


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups that this rank belongs to; an encoder rank has `control` and `features`, the others are None.

    Attributes:
        layout: the sizes of all axes.
        seat: where this rank sits on them.
        tensor: ranks that share this rank's matrices.
        data: ranks that hold the same shard for other samples; ZeRO-2 partitions over them.
        pipeline: one rank of each stage of this rank's replica: those with its place in the tensor group.
        flags: the ranks of `pipeline` again, to talk beside the pipeline's own messages; None without a pipeline.
        model: tensor x pipeline, one whole replica.
        expert: ranks that share the MoE experts of a layer.
        expert_data: ranks that hold the same MoE experts; ZeRO-2 partitions those over them.
        language: every language rank.
        storage: every language rank, over gloo: for checkpoints that are written while the run goes on.
        control: every rank of the job, over gloo: for objects and small messages; None in a dry run, whose ranks have
            nobody to talk to.
        features: every rank of the job, for features alone; on NCCL each pair of ranks that has exchanged some has a
            communicator and a stream of its own. None where the job has no encoder ranks.
        collection: all these groups in the form that megatron-core's layers take.
    """

    layout: ParallelLayout
    seat: Seat
    tensor: ProcessGroup | None = None
    data: ProcessGroup | None = None
    pipeline: ProcessGroup | None = None
    flags: ProcessGroup | None = None
    model: ProcessGroup | None = None
    expert: ProcessGroup | None = None
    expert_data: ProcessGroup | None = None
    language: ProcessGroup | None = None
    storage: ProcessGroup | None = None
    control: ProcessGroup | None = None
    features: ProcessGroup | None = None
    collection: ProcessGroupCollection | None = None

    @classmethod
    def create(
        cls,
        layout: ParallelLayout,
        backend: str,
        timeout: timedelta | None = None,
        storage_timeout: timedelta | None = None,
        *,
        storage_backend: str = "gloo",
    ) -> "ProcessGroups":
        """Build every group on the initialised world; all ranks call this together, once.

        A group does not take over the world's timeout: without one of its own it waits as long as the backend likes.

        Args:
            layout: how the ranks are divided.
            backend: of every group but `storage` and `control`: nccl or gloo.
            timeout: how long an operation of these groups may take.
            storage_timeout: how long an operation of `storage` and `control` may take.
            storage_backend: of `storage` and `control`: gloo, or fake in a dry run.
        """
        with _connected_when_used():
            return cls._create(layout, backend, timeout, storage_timeout, storage_backend)

    @classmethod
    def _create(
        cls,
        layout: ParallelLayout,
        backend: str,
        timeout: timedelta | None,
        storage_timeout: timedelta | None,
        storage_backend: str,
    ) -> "ProcessGroups":
        """Build every group, as `create` says."""
        sizes = layout.config
        dense = {"tp": sizes.tensor, "cp": 1, "dp": layout.data, "pp": sizes.pipeline}
        experts = {
            "expt_tp": sizes.expert_tensor, "ep": sizes.expert, "expt_dp": layout.expert_data, "pp": sizes.pipeline,
        }  # fmt: skip

        def create(
            grid: dict[str, int], axes: dict[str, list[str]], backend: str, timeout: timedelta | None = timeout
        ) -> dict[str, ProcessGroup]:
            ranks = HyperCommGrid(list(grid.values()), list(grid), rank_offset=0, backend=backend)
            return {name: ranks.create_pg(dims, timeout=timeout, group_desc=name) for name, dims in axes.items()}

        groups = create(dense, _DENSE, backend) | create(experts, _EXPERTS, backend)
        flags = create(dense, {"flags": ["pp"]}, backend) if sizes.pipeline > 1 else {}
        storage = create(dense, {"storage": ["tp", "cp", "dp", "pp"]}, storage_backend, storage_timeout)
        control = features = None
        if storage_backend != "fake":
            control = _of_all_ranks("control", storage_backend, storage_timeout)
        if sizes.encoder:
            features = _of_all_ranks("features", backend, timeout, _transfers() if backend == "nccl" else None)
        seat = layout.seat(dist.get_rank())
        if seat.encoder is not None:
            return cls(layout, seat, control=control, features=features)
        collection = ProcessGroupCollection()
        for name, group in groups.items():
            setattr(collection, name, group)
        collection.embd = collection.pos_embd = None  # input and output embeddings are not tied
        _install_globals(collection)
        return cls(
            layout,
            seat,
            tensor=groups["tp"],
            data=groups["dp"],
            pipeline=groups["pp"],
            flags=flags.get("flags"),
            model=groups["mp"],
            expert=groups["ep"],
            expert_data=groups["expt_dp"],
            language=groups["language"],
            storage=storage["storage"],
            control=control,
            features=features,
            collection=collection,
        )

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens and pictures."""
        return self.seat.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes losses."""
        return self.seat.pipeline == self.layout.config.pipeline - 1


def _of_all_ranks(name: str, backend: str, timeout: timedelta | None, options: Any = None) -> ProcessGroup:
    """Make one more group of every rank of the job, with options of its backend."""
    group = dist.new_group(timeout=timeout, backend=backend, pg_options=options, group_desc=name)
    assert isinstance(group, ProcessGroup)
    return group


def _transfers() -> Any:
    """Choose how NCCL carries features: on a small part of a GPU, so that there is room for a transfer to each replica.

    They go before what is computed, so that neither end waits in NCCL for the other end's layers.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = _TRANSFER_BLOCKS
    return options


@contextmanager
def _connected_when_used() -> Iterator[None]:
    """Let each group that is made inside connect its ranks when it is first used.

    Where the world is bound to a GPU, torch divides the world's communicator for every group as soon as it is made: a
    collective of all ranks for each of hundreds of groups, most of which are never used; one stream for all messages
    between ranks of a group, which then wait for each other; and a hang where a gloo group leaves ranks out, since
    those divide the communicator and its members do not.
    """
    world = dist.group.WORLD
    assert world is not None, "the ranks have not met"
    device, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = device


def _install_globals(collection: ProcessGroupCollection) -> None:
    """Give megatron-core's global state the same groups, for the few places that still read it.

    Its layers take groups as arguments, but its cross entropy, random states, gather and scatter functions and pipeline
    schedule ask `parallel_state`. The public way to fill that, `initialize_model_parallel`, makes groups of its own: a
    second set of communicators, and an order of ranks that knows no encoder ranks. So its private variables are set.
    """
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = collection.tp
    parallel_state._PIPELINE_MODEL_PARALLEL_GROUP = collection.pp
    parallel_state._CONTEXT_PARALLEL_GROUP = collection.cp
    parallel_state._DATA_PARALLEL_GROUP = collection.dp
    parallel_state._DATA_PARALLEL_GROUP_WITH_CP = collection.dp_cp
    parallel_state._MODEL_PARALLEL_GROUP = collection.mp
    parallel_state._EXPERT_MODEL_PARALLEL_GROUP = collection.ep
    parallel_state._EXPERT_TENSOR_PARALLEL_GROUP = collection.expt_tp
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def agree(work: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Do something on every rank that may fail for the user's reasons, and fail on all where one fails.

    All ranks of the job call this together; each returns its own result.

    Args:
        work: what to do.
        group: every rank of the job, the one to talk over; the world unless given.

    Raises:
        SphinxError: the error of the lowest rank that had one, marked as shared.
    """
    result, error = None, None
    try:
        result = work()
    except SphinxError as raised:
        error = raised
    errors: list[SphinxError | None] = [error] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=group)
    for first in errors:
        if first is not None:
            first.is_shared = True
            raise first
    return cast(T, result)
