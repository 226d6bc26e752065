"""The encoder stage: dealing, the channel, look-ahead and back-pressure."""

import os
import random
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_sphinx.data.packing import Segment, views_in
from megatron_sphinx.data.pixels import Pixels
from megatron_sphinx.liveness.progress import Progress
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.parallel.layout import ParallelConfig, ParallelLayout
from megatron_sphinx.run import job
from megatron_sphinx.stage.channel import FeatureReceiver, FeatureSender, encode, encoded_together, shares_of
from megatron_sphinx.stage.dealing import deal, joined
from megatron_sphinx.stage.producer import produce
from megatron_sphinx.stage.schedule import Scheduled

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
        deadline = time.monotonic() + 20
        while int(store.get("sent")) < lookahead:  # it does run ahead
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for taken in range(20):
            time.sleep(0.1)
            begun = int(store.get("sent"))
            assert begun <= taken + 2 * lookahead, f"{begun} begun when {taken} were taken"
            source.next()
    dist.barrier()


@pytest.mark.parametrize("lookahead", [1, 3])
def test_the_encoder_runs_ahead_but_not_without_bound(run_ranks, lookahead):
    run_ranks(2, lambda: run_ahead(lookahead))


@pytest.mark.parametrize(
    ("counts", "size", "together"),
    [
        ([32, 32], 32, 1),
        ([29, 40], 32, 1),  # nine tenths of a batch are enough
        ([20, 20, 20, 20], 32, 3),  # 60 of 64
        ([6, 6, 6, 6], 32, 4),
        ([28, 28, 28], 32, 1),  # seven eighths, however many
        ([64, 1], 32, 1),
        ([3], 32, 1),
    ],
)
def test_micro_batches_are_joined_where_that_fills_batches(counts, size, together):
    assert joined(counts, size) == together


@pytest.mark.parametrize("seed", range(10))
def test_joined_micro_batches_waste_no_more_than_single_ones(seed):
    rng = random.Random(seed)
    counts, size = [rng.randint(1, 40) for _ in range(rng.randint(1, 6))], rng.choice([8, 32])

    def fill(number: int) -> float:
        return sum(counts[:number]) / (-(-sum(counts[:number]) // size) * size)

    chosen = joined(counts, size)
    assert fill(chosen) >= fill(1)
    assert fill(chosen) >= 0.9 or fill(chosen) == max(map(fill, range(1, len(counts) + 1)))


class Reading:
    """Stands for views that threads read: they are told by their numbers."""

    def __init__(self, name: int, numbers: list[int], bad: tuple[int, ...], reported: list) -> None:
        self.name, self.views, self.bad, self.reported = name, numbers, bad, reported

    def wait(self) -> None:
        """Nothing to wait for."""

    def result(self) -> Pixels:
        return Pixels(
            {2: torch.tensor(self.views, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)}, self.bad
        )

    def report(self, index: int, _reason: str) -> None:
        self.reported.append((self.name, index))


class Encoding:
    """Stands for encoders: a feature is the number that its view has, NaN for 13; it remembers what it was given."""

    def __init__(self, size: int) -> None:
        self.config, self.calls = SimpleNamespace(views_at_once=size), []

    def __call__(self, *views):
        self.calls.append([len(part[2]) for part in views])
        numbers = torch.cat([part[2][:, :1, 0, 0] for part in views]).to(torch.bfloat16)
        return torch.where(numbers == 13, torch.nan, numbers).expand(-1, VALUES).contiguous()


def test_views_of_joined_micro_batches_go_back_to_their_own():
    """Bad images and NaN stay with the micro-batch that they are of."""
    reported: list = []
    upcoming = [
        Reading(0, [1, 2], (1,), reported), None, Reading(1, [3], (), reported), Reading(2, [13, 4, 5], (), reported),
        Reading(3, [6], (), reported),
    ]  # fmt: skip
    encoders = Encoding(size=6)
    chosen = encoded_together(upcoming, encoders, 4)
    assert [pixels.name for pixels in chosen] == [0, 1, 2]
    assert [pixels.name for pixels in encoded_together(upcoming, encoders, 2)] == [0, 1]
    parts = encode(encoders, chosen)
    assert encoders.calls == [[2, 1, 3]]
    assert [part[:, 0].nan_to_num(-1).tolist() for part in parts] == [[1, -1], [3], [-1, 4, 5]]
    assert reported == [(2, 0)]


class Sending:
    """Stands for a sender: it keeps what it is given, and says when."""

    def __init__(self) -> None:
        self.sent: list[list[list[float]]] = []

    def send(self, _shares, features) -> None:
        self.sent.append([part[:, 0].tolist() for part in features])

    def drain(self) -> None:
        """Nothing is on its way."""


@pytest.mark.parametrize("lookahead", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_an_encoder_sends_each_micro_batch_for_itself(run_ranks, seed, lookahead):
    """Whatever it has encoded together, in order, and never more than it may be ahead."""
    made = rounds_of(seed, 2, 25)

    def check() -> None:
        job.find_place()
        job.join("cpu", 30)
        encoders, sending, heard = Encoding(size=8), Sending(), []
        reader = SimpleNamespace(submit=lambda views: Reading(0, [pair % 7 for pair, _ in views], (), []))
        produce(
            (Scheduled(0, number, ahead, reader) for number, ahead in enumerate(made)),
            encoder=0, encoder_count=1, encoders=encoders, sender=sending, lookahead=lookahead, progress=Progress(),
            observer=SimpleNamespace(micro_batch=lambda *facts: heard.append(facts)),
        )  # fmt: skip
        wanted = [[[pair % 7 for pair, _ in views_in(rows)] for rows in ahead if views_in(rows)] for ahead in made]
        assert sending.sent == [parts for parts in wanted if parts]
        assert [views for views, *_ in heard] == [sum(map(len, parts)) for parts in wanted]
        assert all(one[1:] <= other[1:] for one, other in pairwise(heard))
        assert max(map(len, encoders.calls)) <= lookahead
        assert lookahead == 1 or max(map(len, encoders.calls)) > 1

    run_ranks(1, check)
