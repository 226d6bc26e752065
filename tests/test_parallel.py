"""Layouts, groups, random streams, and how ranks fail together."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sphinx import platform, run
from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.parallel.groups import ProcessGroups, agree
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.parallel.lifeline import Lifeline
from megatron_sphinx.parallel.seeding import generator, random_state, restore_random_state, seed_rank


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (4, {"tensor": 0}, r"parallel\.tensor=0: must be at least 1"),
        (4, {"encoder": -1}, r"parallel\.encoder=-1: must be at least 0"),
        (4, {"pipeline": 2}, r"parallel\.pipeline=2: the language model is one stage here; use 1"),
        (2, {"encoder": 2}, r"parallel\.encoder=2: leaves no language rank of the 2 in the job; use 0 to 1"),
        (7, {"tensor": 4, "encoder": 1}, r"parallel\.tensor=4: must divide the 6 language ranks \(7 in the job, 1 of "
                                         r"them encoders\); use one of \[1, 2, 3, 6\]"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(world, sizes, message):
    with pytest.raises(ConfigError, match=message):
        ParallelLayout(world=world, config=ParallelConfig(**sizes))


@pytest.mark.parametrize(("tensor", "data", "encoder"), [(1, 1, 0), (2, 3, 2), (4, 2, 1), (1, 5, 3)])
def test_every_rank_has_one_seat(tensor, data, encoder):
    layout = ParallelLayout(world=tensor * data + encoder, config=ParallelConfig(tensor=tensor, encoder=encoder))
    assert layout.data == data
    seats = [layout.seat(rank) for rank in range(layout.world)]
    language = [seat for seat in seats if seat.role == "language"]
    assert {(seat.data, seat.tensor) for seat in language} == {(d, t) for d in range(data) for t in range(tensor)}
    assert all(layout.rank_of(data=seat.data, tensor=seat.tensor) == seat.rank for seat in language)
    assert [seat.encoder for seat in seats[len(language) :]] == list(range(encoder))
    assert [layout.encoder_rank(number) for number in range(encoder)] == list(range(len(language), layout.world))


def create(tensor: int, encoder: int) -> ProcessGroups:
    _, world = run._place()
    run._meet(platform.current(), 30)
    layout = ParallelLayout(world=world, config=ParallelConfig(tensor=tensor, encoder=encoder))
    return ProcessGroups.create(layout, "gloo")


def wait_for_nobody():
    _, world = run._place()
    run._meet(platform.current(), 60)
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
