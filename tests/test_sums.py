"""What ranks add up of a step: each field says how the numbers of all ranks become one."""

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist

from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.training.sums import Reduction, Sums, reduce_sums

WHOLE = {  # what every field is to be, of what each rank of TP2 x DP2 says of it: tensor ranks 0 and 1 of two replicas
    "loss_pairs": lambda said: said[0] + said[2],
    "loss_text": lambda said: said[0] + said[2],
    "targets_pairs": lambda said: said[0] + said[2],
    "targets_text": lambda said: said[0] + said[2],
    "bad_pairs": lambda said: said[0] + said[2],
    "feature_bytes": lambda said: said[0] + said[2],
    "bad_data": lambda said: said[0] + said[2],
    "balance": sum,
    "stop": sum,
    "failed": sum,
    "exposed_encoder_seconds": max,
    "data_wait_seconds": max,
}


def told(rank: int) -> Sums:
    """Numbers that differ from rank to rank and from field to field; rank 2 has waited longest for data."""
    sums = Sums(**{number.name: (place + 1) * (rank + 1) for place, number in enumerate(fields(Sums))})
    sums.data_wait_seconds = [3.0, 1.0, 7.0, 5.0][rank]
    return sums


def check_every_field_is_reduced_as_it_says() -> None:
    dist.init_process_group("gloo")
    layout = ParallelLayout(world=4, config=ParallelConfig(tensor=2))
    groups = ProcessGroups.create(layout, "gloo")
    whole = told(groups.seat.rank).over_ranks(groups, torch.device("cpu"))
    for name, become in WHOLE.items():
        assert getattr(whole, name) == become([getattr(told(rank), name) for rank in range(4)]), name
    assert whole.data_wait_rank == 2


def test_every_field_is_reduced_as_it_says(run_ranks):
    assert {number.name for number in fields(Sums)} == {*WHOLE, "data_wait_rank"}
    run_ranks(4, check_every_field_is_reduced_as_it_says)


def test_the_spelling_of_a_field_decides_nothing():
    for number in fields(Sums):
        assert isinstance(number.metadata["reduction"], Reduction), number.name
        is_place = number.metadata["reduction"] is Reduction.RANK_OF_MAX
        assert (number.metadata["by"] in {other.name for other in fields(Sums)}) is is_place
    assert Sums() == Sums(**{number.name: 0.0 for number in fields(Sums)})


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_rank_alone_keeps_its_numbers(ranks):
    everyone = torch.zeros(ranks, len(fields(Sums)), dtype=torch.float64)
    everyone[-1] = torch.tensor(told(0).contribution(is_first=True), dtype=torch.float64)
    whole = reduce_sums(everyone)
    assert whole.data_wait_rank == ranks - 1
    assert whole.loss_pairs == told(0).loss_pairs
    quiet = told(0).contribution(is_first=False)
    assert quiet[0] == 0.0, "all of a tensor group know the same; it counts once"
