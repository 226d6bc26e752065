"""The encoder stage: dealing, the channel, look-ahead and back-pressure."""

import os
import random
import time

import pytest
import torch
import torch.distributed as dist

from megatron_sphinx.data.packing import Segment
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import job
from megatron_sphinx.stage.channel import FeatureReceiver, FeatureSender, shares_of
from megatron_sphinx.stage.dealing import deal

VALUES = 6


@pytest.mark.parametrize("seed", range(20))
def test_dealing_leaves_nothing_out_and_is_fair(seed):
    rng = random.Random(seed)
    costs = [[rng.uniform(0.5, 3.0) for _ in range(rng.choice([0, 1, 5, 20]))] for _ in range(rng.randint(1, 6))]
    encoders = rng.randint(1, 7)
    shares = deal(costs, encoders)
    dealt = [(s.replica, n) for s in shares for n in range(s.first, s.first + s.count)]
    assert dealt == [(replica, n) for replica, views in enumerate(costs) for n in range(len(views))]
    assert all(share.count for share in shares)
    assert len(shares) < len(costs) + encoders
    load = [0.0] * encoders
    for share in shares:
        load[share.encoder] += sum(costs[share.replica][share.first : share.first + share.count])
    if shares:
        fair = sum(load) / encoders
        assert max(load) <= fair + max(cost for views in costs for cost in views)


@pytest.mark.parametrize(("replicas", "views", "encoders"), [(1, 4, 2), (2, 3, 2), (3, 4, 6), (4, 1, 2), (1, 7, 7)])
def test_views_of_equal_cost_are_dealt_evenly_where_they_can_be(replicas, views, encoders):
    dealt = [0] * encoders
    for part in deal([[1.0] * views] * replicas, encoders):
        dealt[part.encoder] += part.count
    assert dealt == [replicas * views // encoders] * encoders


def rounds_of(seed: int, replicas: int, count: int) -> list:
    """Micro-batches with random numbers of pictures, some with none at all."""
    rng = random.Random(seed)
    made, pair = [], 0
    for _ in range(count):
        micro = []
        for _ in range(replicas):
            views = rng.choice([0, 0, 1, 3, 8])
            micro.append((tuple(Segment(True, pair + n, 0, 5, 2, 3, (0,)) for n in range(views)),))
            pair += views
        if rng.random() < 0.3:
            micro = [((Segment(False, 0, 0, 5, 5, 4),),)] * replicas
        made.append(tuple(micro))
    return made


def features_of(pairs: list[int]) -> torch.Tensor:
    """What an encoder would give: recognisable numbers."""
    return torch.tensor(pairs, dtype=torch.bfloat16)[:, None].expand(-1, VALUES).contiguous()


def exchange(seed: int, tensor: int, encoders: int, lookahead: int, pause: float) -> None:
    _, world = job.find_place()
    job.join("cpu", 30)
    layout = ParallelLayout(world=world, config=ParallelConfig(tensor=tensor, encoder=encoders))
    groups = ProcessGroups.create(layout, "gloo")
    made = rounds_of(seed, layout.data, 25)
    rng = random.Random(f"{seed} {os.environ['RANK']}")
    if groups.seat.encoder is not None:
        sender = FeatureSender(groups, lookahead)
        for ahead in made:
            shares = [share for share in shares_of(ahead, encoders) if share.encoder == groups.seat.encoder]
            pairs = [[piece.item for piece in ahead[share.replica][0] if piece.is_sample] for share in shares]
            parts = [features_of(p[s.first : s.first + s.count]) for p, s in zip(pairs, shares, strict=True)]
            time.sleep(rng.random() * pause)
            if shares:
                sender.send(shares, parts)
        sender.drain()
    else:
        source = FeatureReceiver(iter(made), groups, values=VALUES, lookahead=lookahead)
        received = 0
        for ahead in made:
            time.sleep(rng.random() * pause)
            pairs = [piece.item for piece in ahead[groups.seat.data][0] if piece.is_sample]
            assert torch.equal(source.next(), features_of(pairs))
            received += 2 * VALUES * len(pairs)
        assert source.received_bytes == received
    dist.barrier()


@pytest.mark.parametrize("seed", range(8))
def test_any_number_of_encoders_feeds_any_number_of_replicas(run_ranks, seed):
    rng = random.Random(seed)
    tensor, data, encoders, lookahead = rng.choice([1, 2]), rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 5)
    run_ranks(tensor * data + encoders, lambda: exchange(seed, tensor, encoders, lookahead, pause=0.004))


def run_ahead(lookahead: int) -> None:
    """A reader that takes nothing for a while: how far does the encoder get?"""
    job.find_place()
    job.join("cpu", 30)
    layout = ParallelLayout(world=2, config=ParallelConfig(encoder=1))
    groups = ProcessGroups.create(layout, "gloo")
    store = dist.distributed_c10d._get_default_store()
    made = [(((Segment(True, n, 0, 5, 2, 3, (0,)),),),) for n in range(20)]
    if groups.seat.encoder is not None:
        sender = FeatureSender(groups, lookahead)
        for n, ahead in enumerate(made):
            store.set("sent", str(n))
            sender.send(shares_of(ahead, 1), [features_of([n])])
        sender.drain()
    else:
        source = FeatureReceiver(iter(made), groups, values=VALUES, lookahead=lookahead)
        for taken in range(20):
            time.sleep(0.1)
            begun = int(store.get("sent"))
            assert begun <= taken + 2 * lookahead, f"{begun} begun when {taken} were taken"
            if taken == 0:
                assert begun >= lookahead  # but it does run ahead
            source.next()
    dist.barrier()


@pytest.mark.parametrize("lookahead", [1, 3])
def test_the_encoder_runs_ahead_but_not_without_bound(run_ranks, lookahead):
    run_ranks(2, lambda: run_ahead(lookahead))
