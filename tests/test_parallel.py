"""Layouts, groups, random streams, and how ranks fail together."""

import time
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.liveness.lifeline import Lifeline
from megatron_sphinx.parallel.groups import ProcessGroups, agree
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.parallel.seeding import generator, random_state, restore_random_state, seed_rank
from megatron_sphinx.run import job


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (4, {"tensor": 0}, r"parallel\.tensor=0: must be at least 1"),
        (4, {"encoder": -1}, r"parallel\.encoder=-1: must be at least 0"),
        (4, {"expert": 0}, r"parallel\.expert=0: must be at least 1"),
        (4, {"sequence": True}, r"parallel\.sequence=true: the tokens are shared by tensor ranks; set parallel\.tensor "
                                r"above 1"),
        (4, {"pipeline": 2, "pipeline_layers": (3,)}, r"parallel\.pipeline_layers=\[3\]: must name the layers of each "
                                                      r"of the 2 stages of parallel\.pipeline"),
        (4, {"pipeline": 3}, r"parallel\.pipeline=3: must divide the 4 language ranks \(4 in the job, 0 of them "
                             r"encoders\); use one of \[1, 2, 4\], or another number of ranks"),
        (8, {"expert": 2, "expert_tensor": 3}, r"parallel\.expert=2: times parallel\.expert_tensor=3 must divide the 8 "
                                               r"language ranks of a pipeline stage .* use for both together one of "
                                               r"\[1, 2, 4, 8\]"),
        (2, {"encoder": 2}, r"parallel\.encoder=2: leaves no language rank of the 2 in the job; use 0 to 1"),
        (7, {"tensor": 4, "encoder": 1}, r"parallel\.tensor=4: must divide the 6 language ranks of a pipeline stage "
                                         r"\(7 in the job, 1 of them encoders\); use one of \[1, 2, 3, 6\]"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(world, sizes, message):
    with pytest.raises(ConfigError, match=message):
        ParallelLayout(world=world, config=ParallelConfig(**sizes))


@pytest.mark.parametrize(
    ("tensor", "data", "pipeline", "expert", "expert_tensor", "encoder"),
    [(1, 1, 1, 1, 1, 0), (2, 3, 1, 3, 2, 2), (4, 2, 3, 2, 2, 1), (1, 6, 2, 3, 1, 3), (2, 4, 2, 2, 1, 1)],
)
def test_every_rank_has_one_seat(tensor, data, pipeline, expert, expert_tensor, encoder):
    sizes = ParallelConfig(
        tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor, encoder=encoder
    )
    layout = ParallelLayout(world=tensor * data * pipeline + encoder, config=sizes)
    least = sizes.smallest_world
    assert ParallelLayout(world=least, config=sizes).world == least <= layout.world
    assert layout.data == data
    copies = layout.expert_data
    assert copies * expert * expert_tensor == tensor * data
    seats = [layout.seat(rank) for rank in range(layout.world)]
    language = [seat for seat in seats if seat.role == "language"]
    places = set(product(range(pipeline), range(data), range(tensor)))
    assert {(seat.pipeline, seat.data, seat.tensor) for seat in language} == places
    of_experts = set(product(range(pipeline), range(copies), range(expert), range(expert_tensor)))
    assert {(s.pipeline, s.expert_data, s.expert, s.expert_tensor) for s in language} == of_experts
    ranks = [layout.rank_of(data=s.data, tensor=s.tensor, pipeline=s.pipeline) for s in language]
    assert ranks == [seat.rank for seat in language]
    assert [seat.encoder for seat in seats[len(language) :]] == list(range(encoder))
    assert [layout.encoder_rank(number) for number in range(encoder)] == list(range(len(language), layout.world))


@pytest.mark.parametrize(
    ("sizes", "layers", "stages"),
    [
        ({}, 5, (5,)),
        ({"pipeline": 2}, 5, (3, 2)),
        ({"pipeline": 4}, 7, (2, 2, 2, 1)),
        ({"pipeline": 3, "pipeline_layers": (2, 4, 1)}, 7, (2, 4, 1)),
    ],
)
def test_layers_are_cut_into_stages(sizes, layers, stages):
    assert ParallelConfig(**sizes).stage_layers(layers) == stages


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pipeline": 4}, r"parallel\.pipeline=4: leaves stages without a layer; use at most model\.layers=3"),
        ({"pipeline": 2, "pipeline_layers": (1, 1)}, r"parallel\.pipeline_layers=\[1, 1\]: must be at least 1 each and "
                                                     r"model\.layers=3 together"),
        ({"pipeline": 2, "pipeline_layers": (3, 0)}, r"parallel\.pipeline_layers=\[3, 0\]: must be at least 1 each"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**sizes).stage_layers(3)


def create(encoder: int = 0, **sizes: int) -> ProcessGroups:
    _, world = job.find_place()
    job.join("cpu", 30)
    layout = ParallelLayout(world=world, config=ParallelConfig(encoder=encoder, **sizes))
    return ProcessGroups.create(layout, "gloo")


def wait_for_nobody():
    _, world = job.find_place()
    job.join("cpu", 60)
    layout = ParallelLayout(world=world, config=ParallelConfig())
    groups = ProcessGroups.create(layout, "gloo", timedelta(seconds=1))
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.all_reduce(torch.zeros(1), group=groups.data)
    else:
        time.sleep(4)


def test_a_collective_that_does_not_end_is_an_error_within_the_timeout(run_ranks):
    start = time.monotonic()
    run_ranks(2, wait_for_nobody)
    assert time.monotonic() - start < 30


def check_groups():
    groups = create(tensor=2, encoder=1)
    rank = dist.get_rank()
    if rank == 4:
        assert groups.seat.role == "encoder"
        assert groups.tensor is groups.data is groups.collection is None
        return
    assert dist.get_process_group_ranks(groups.tensor) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert dist.get_process_group_ranks(groups.data) == [rank % 2, rank % 2 + 2]
    assert dist.get_process_group_ranks(groups.model) == dist.get_process_group_ranks(groups.tensor)
    assert dist.get_process_group_ranks(groups.language) == [0, 1, 2, 3]
    assert parallel_state.get_tensor_model_parallel_group() is groups.collection.tp


def test_groups_are_the_planned_ones(run_ranks):
    run_ranks(5, check_groups)


def check_groups_of_stages_and_experts():
    groups = create(tensor=2, pipeline=2, expert=2, expert_tensor=2, encoder=1)  # 2 x 2 x data 2
    rank = dist.get_rank()
    if rank == 8:
        assert groups.pipeline is groups.expert is groups.expert_data is None
        return
    stage, here = divmod(rank, 4)
    ranks = dist.get_process_group_ranks
    assert ranks(groups.pipeline) == ranks(groups.flags) == [here, here + 4]
    assert ranks(groups.model) == [here // 2 * 2 + at for at in (0, 1, 4, 5)]
    assert ranks(groups.expert) == [4 * stage + here % 2, 4 * stage + here % 2 + 2]
    assert ranks(groups.collection.expt_tp) == [4 * stage + here // 2 * 2, 4 * stage + here // 2 * 2 + 1]
    assert ranks(groups.expert_data) == [rank]
    assert ranks(groups.storage) == list(range(8))
    assert (groups.is_first_stage, groups.is_last_stage) == (stage == 0, stage == 1)


def test_groups_of_stages_and_experts_are_the_planned_ones(run_ranks):
    run_ranks(9, check_groups_of_stages_and_experts)


def check_agree():
    create(tensor=1, encoder=1)

    def work() -> None:
        if dist.get_rank() == 1:
            raise DataError("rank one speaks")

    with pytest.raises(DataError, match="rank one speaks") as raised:
        agree(work)
    assert raised.value.is_shared
    assert agree(lambda: dist.get_rank()) == dist.get_rank()


def test_a_mistake_on_one_rank_is_raised_on_all(run_ranks):
    run_ranks(3, check_agree)


def fail_far_ahead():
    create(tensor=1, encoder=1)
    rank = dist.get_rank()
    lifeline = Lifeline.connect(f"rank {rank}")
    if rank == 1:
        lifeline.leave(5, "rank one speaks")
    while True:  # as in a collective that never ends
        time.sleep(1)


def test_ranks_that_hang_leave_within_seconds_of_the_first_failure(start_ranks):
    ranks = start_ranks(3, fail_far_ahead)
    start = time.monotonic()
    assert ranks.wait() == [5, 5, 5]
    assert time.monotonic() - start < 20
    assert "[rank 2] leaves: rank 1 ended the job (rank one speaks)" in ranks.text(2)


def test_streams_depend_on_seed_and_name_only():
    draws = [torch.rand(3, generator=generator(seed, name)) for seed, name in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def check_random_state():
    groups = create(tensor=1, encoder=0)
    seed_rank(7, groups.seat)
    state = random_state()
    first = torch.rand(4)
    restore_random_state(state)
    assert torch.equal(first, torch.rand(4))


def test_random_state_is_restored(run_ranks):
    run_ranks(1, check_random_state)
