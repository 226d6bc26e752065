"""The channel's order: nothing begins before its other end is ready, nobody waits in a circle, deaths are noticed."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_stage import VALUES, features_of, rounds_of

from megatron_sphinx.data.packing import Segment
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import job
from megatron_sphinx.stage import rendezvous
from megatron_sphinx.stage.channel import FeatureReceiver, FeatureSender, shares_of

ONE_VIEW = [(((Segment(True, n, 0, 5, 2, 3, (0,)),),),) for n in range(6)]  # micro-batches of one picture


def meet(tensor: int, encoders: int) -> ProcessGroups:
    _, world = job.find_place()
    job.join("cpu", 60)
    return ProcessGroups.create(
        ParallelLayout(world=world, config=ParallelConfig(tensor=tensor, encoder=encoders)), "gloo"
    )


class Witness:
    """Stands for torch.distributed in the channel, and writes into the job's store what each rank begins, beforehand.

    What a rank sees there when it begins something has caused it, or could have.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self.groups, self.begun = groups, 0
        self.store = dist.distributed_c10d._get_default_store()
        self.Work, self.ProcessGroup = dist.Work, dist.ProcessGroup

    def note(self, what: str, sender: int, receiver: int) -> int:
        return self.store.add(f"{what} {sender} {receiver}", 1)

    def known(self, what: str, sender: int, receiver: int) -> int:
        return self.store.add(f"{what} {sender} {receiver}", 0)

    def isend(self, tensor, rank, *, group, tag=0):
        own, is_encoder = dist.get_rank(), self.groups.seat.encoder is not None
        if group is self.groups.features:
            begun = self.note("sent", own, rank)
            assert begun <= self.known("asked", own, rank), f"send {begun} to {rank} begins before it is asked for"
        elif is_encoder:
            self.note("announced", own, rank)
        else:
            self.note("asked", rank, own)
        return dist.isend(tensor, rank, group=group, tag=tag)

    def irecv(self, tensor, rank, *, group, tag=0):
        if group is self.groups.features:
            begun = self.note("received", rank, dist.get_rank())
            announced = self.known("announced", rank, dist.get_rank())
            assert begun <= announced, f"receive {begun} from {rank} begins before it is announced"
            self.begun = begun
        return dist.irecv(tensor, rank, group=group, tag=tag)


class OneQueue:
    """A language rank's GPU at its worst: everything that waits for another rank runs in one queue, in launch order."""

    def __init__(self, groups: ProcessGroups) -> None:
        self.groups, self.queue = groups, ThreadPoolExecutor(1)
        self.Work, self.ProcessGroup, self.isend = dist.Work, dist.ProcessGroup, dist.isend

    def irecv(self, tensor, rank, *, group, tag=0):
        if group is not self.groups.features:
            return dist.irecv(tensor, rank, group=group, tag=tag)
        received = self.queue.submit(dist.recv, tensor, rank, group=group, tag=tag)
        return SimpleNamespace(wait=received.result)

    def reduce(self, group: dist.ProcessGroup):
        """Launch a collective of the language ranks, and wait for nothing."""
        return self.queue.submit(dist.all_reduce, torch.ones(1), group=group)


def encode_and_send(groups: ProcessGroups, made: list, lookahead: int, rng: random.Random, pause: float) -> None:
    sender, encoders = FeatureSender(groups, lookahead), groups.layout.config.encoder
    for ahead in made:
        shares = [share for share in shares_of(ahead, encoders) if share.encoder == groups.seat.encoder]
        pairs = [[piece.item for piece in ahead[share.replica][0] if piece.is_sample] for share in shares]
        parts = [features_of(p[s.first : s.first + s.count]) for p, s in zip(pairs, shares, strict=True)]
        time.sleep(rng.choice([0, 0, rng.random()]) * pause)
        if shares:
            sender.send(shares, parts)
        assert len(sender._sent) <= lookahead
    sender.drain()


def pairs_of(groups: ProcessGroups, ahead) -> list[int]:
    return [piece.item for piece in ahead[groups.seat.data][0] if piece.is_sample]


def exchange(seed: int, tensor: int, encoders: int, lookahead: int, transport: type) -> None:
    groups = meet(tensor, encoders)
    made = rounds_of(seed, groups.layout.data, 25)
    rng, pause = random.Random(f"{seed} {os.environ['RANK']}"), 0.02
    on_this_rank = transport(groups)
    if transport is Witness or groups.seat.encoder is None:
        rendezvous.dist = on_this_rank
    if groups.seat.encoder is not None:
        encode_and_send(groups, made, lookahead, rng, pause)
    else:
        source = FeatureReceiver(iter(made), groups, values=VALUES, lookahead=lookahead)
        launched = []
        for ahead in made:
            time.sleep(rng.choice([0, 0, rng.random()]) * pause)
            if transport is OneQueue:  # between two micro-batches the replicas meet, each behind what it has launched
                launched.append(on_this_rank.reduce(groups.language))
            assert torch.equal(source.next(), features_of(pairs_of(groups, ahead)))
        for work in launched:
            work.result()
    dist.barrier()


@pytest.mark.parametrize("transport", [Witness, OneQueue])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_begins_before_its_other_end_and_nobody_waits_in_a_circle(run_ranks, seed, transport):
    rng = random.Random(f"order {seed}")
    tensor, data, encoders, lookahead = rng.choice([1, 2]), rng.randint(2, 3), rng.randint(2, 3), rng.randint(1, 4)
    run_ranks(tensor * data + encoders, lambda: exchange(seed, tensor, encoders, lookahead, transport))


def receive_late(lookahead: int) -> None:
    """The encoder announces all it may before the first micro-batch is taken: then how many receives begin?"""
    groups = meet(1, 1)
    rendezvous.dist = witness = Witness(groups)
    if groups.seat.encoder is not None:
        encode_and_send(groups, ONE_VIEW, lookahead, random.Random(0), 0)
    else:
        source = FeatureReceiver(iter(ONE_VIEW), groups, values=VALUES, lookahead=lookahead)
        for taken in range(len(ONE_VIEW)):
            due = min(lookahead, len(ONE_VIEW) - taken)
            while witness.known("announced", 1, 0) < taken + due:
                time.sleep(0.001)
            for arrival in [arrival for ahead in source._ahead for arrival in ahead.arrivals][:due]:
                while not arrival.is_announced:
                    time.sleep(0.001)
            source.next()
            assert taken + due <= witness.begun <= taken + 1 + lookahead, f"{witness.begun} begun, {taken + 1} taken"
    dist.barrier()


@pytest.mark.parametrize("lookahead", [1, 3])
def test_what_is_announced_is_received_ahead_but_not_without_bound(run_ranks, lookahead):
    run_ranks(2, lambda: receive_late(lookahead))


def lose(when: str) -> None:
    """A rank of the two ends without a word; the other one must hear of it."""
    groups = meet(1, 1)
    store = dist.distributed_c10d._get_default_store()
    if groups.seat.encoder is not None:
        if when == "before the announcement":
            os._exit(0)
        if when == "before the send":  # announced, but nobody will hear the language rank ask
            rendezvous.Courier._work = lambda *_: None
        sender = FeatureSender(groups, lookahead=2)
        sender.send(shares_of(ONE_VIEW[0], 1), [features_of([0])])
        if when == "before the send":
            store.wait(["asking"])
            time.sleep(0.1)
            os._exit(0)
        with pytest.raises(RuntimeError, match="gloo"):
            sender.drain()
        return
    source = FeatureReceiver(iter(ONE_VIEW), groups, values=VALUES, lookahead=2)
    if when == "before it asks":
        while not source._ahead[0].arrivals[0].is_announced:
            time.sleep(0.001)
        os._exit(0)
    store.set("asking", "")
    with pytest.raises(RuntimeError, match="gloo"):
        source.next()


@pytest.mark.parametrize("when", ["before the announcement", "before the send", "before it asks"])
def test_a_rank_that_dies_is_an_error_at_the_other_end(run_ranks, when):
    run_ranks(2, lambda: lose(when))


def bind_the_world() -> None:
    """A world bound to a GPU, as on CUDA, where torch lets ranks outside a group divide the world's communicator."""
    _, world = job.find_place()
    job.join("cpu", 30)
    device = torch.device("cuda", 0)
    dist.group.WORLD.bound_device_id = device
    layout = ParallelLayout(world=world, config=ParallelConfig(encoder=1))
    groups = ProcessGroups.create(layout, "gloo")
    assert dist.group.WORLD.bound_device_id == device
    assert groups.control.bound_device_id is groups.features.bound_device_id is None
    names = ("tensor", "data", "model", "language", "storage")
    made = [getattr(groups, name) for name in names]
    assert [group and group.bound_device_id for group in made] == [None] * len(names)
    dist.barrier(group=groups.control)


def test_groups_of_a_world_that_is_bound_to_gpus_connect_when_they_are_used(run_ranks):
    run_ranks(3, bind_the_world)
