"""How features reach the language ranks: forward only, a bounded number of micro-batches ahead, nothing ever back.

Both ends compute the same shares from the plan, so no size or order is ever sent. An encoder sends a share to one rank
of the replica's tensor group, which spreads it inside the group; which one goes round by the encoder's number. A view
whose image could not be read travels as NaN: no flag beside it, no further message.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.data.packing import Row
from megatron_sphinx.data.pixels import PendingPixels, PixelLoader, views_in
from megatron_sphinx.device import Stopwatch, current_platform
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.parallel.groups import ProcessGroups
from megatron_sphinx.stage.dealing import DealtViews, deal, joined

Round = tuple[tuple[Row, ...], ...]  # for each replica, the rows of its next micro-batch


def shares_of(rounds: Round, encoders: int) -> list[DealtViews]:
    """Deal the views of the next micro-batches of all replicas; all views of a run cost its encoders the same."""
    return deal([[1.0] * len(views_in(rows)) for rows in rounds], encoders)


class FeatureSource(Protocol):
    """Where a language rank gets the features of its micro-batches, one after the other."""

    @property
    def waiting(self) -> Stopwatch:
        """The time spent waiting for features so far."""

    @property
    def received_bytes(self) -> int:
        """Bytes of features that came to this replica from encoder ranks so far."""

    def prepare(self, count: int) -> None:
        """Get ready for a step of so many micro-batches; all ranks of a replica call this, together."""

    def next(self) -> Tensor:
        """Take the features of the next micro-batch: bf16 [views, feature_values], NaN where an image is bad."""


def _spread(parts: Sequence[Tensor], owners: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Give every part, which one rank of the group has, to the group's other ranks."""
    if dist.get_world_size(group) > 1:
        for part, owner in zip(parts, owners, strict=True):
            dist.broadcast(part, group=group, group_src=owner)


class FeatureReceiver:
    """The language rank's end: receives are posted `lookahead` micro-batches ahead, so that encoders can run ahead."""

    def __init__(self, rounds: Iterator[Round], groups: ProcessGroups, *, values: int, lookahead: int) -> None:
        platform = current_platform()
        self.waiting, self.received_bytes = Stopwatch(platform), 0
        self._rounds, self._groups, self._values, self._device = rounds, groups, values, platform.device
        self._posted: deque[tuple[list[DealtViews], list[Tensor], list[dist.Work]]] = deque()
        for _ in range(lookahead):
            self._post()

    def _post(self) -> None:
        """Begin to receive one more micro-batch, if there is one."""
        if (ahead := next(self._rounds, None)) is None:
            return
        layout, seat = self._groups.layout, self._groups.seat
        mine = [share for share in shares_of(ahead, layout.config.encoder) if share.replica == seat.data]
        parts = [torch.empty(share.count, self._values, dtype=torch.bfloat16, device=self._device) for share in mine]
        works = []
        for share, part in zip(mine, parts, strict=True):
            if share.encoder % layout.config.tensor == seat.tensor:
                work = dist.irecv(part, layout.encoder_rank(share.encoder))
                assert work is not None
                works.append(work)
        self._posted.append((mine, parts, works))

    def prepare(self, count: int) -> None:
        """Do nothing: the encoders are at work already."""

    def next(self) -> Tensor:
        """Take the features of the next micro-batch, once they have come, and spread them over the tensor group."""
        shares, parts, works = self._posted.popleft()
        self._post()
        with self.waiting:
            for work in works:
                work.wait()
            _spread(parts, [share.encoder % self._groups.layout.config.tensor for share in shares], self._groups.tensor)
        self.received_bytes += sum(part.nbytes for part in parts)
        if not parts:
            return torch.empty(0, self._values, dtype=torch.bfloat16, device=self._device)
        return torch.cat(parts)


class FeatureSender:
    """The encoder rank's end: holds at most `lookahead` micro-batches that nobody has taken yet."""

    def __init__(self, groups: ProcessGroups, lookahead: int) -> None:
        self._layout, self._lookahead = groups.layout, lookahead
        self._sent: deque[list[tuple[dist.Work, Tensor]]] = deque()

    def send(self, shares: Sequence[DealtViews], features: Sequence[Tensor]) -> None:
        """Send the shares of one micro-batch; waits while too many earlier ones are not taken."""
        while len(self._sent) >= self._lookahead:
            self._wait_for_oldest()
        works = []
        for share, part in zip(shares, features, strict=True):
            target = self._layout.rank_of(data=share.replica, tensor=share.encoder % self._layout.config.tensor)
            work = dist.isend(part, target)
            assert work is not None
            works.append((work, part))
        self._sent.append(works)

    def drain(self) -> None:
        """Wait until everything is taken."""
        while self._sent:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        """Wait until the micro-batch that was sent first is taken."""
        for work, _ in self._sent.popleft():
            work.wait()
        current_platform().synchronize()  # NCCL's wait holds back the stream, not this thread


def encoded_together(
    upcoming: Sequence[PendingPixels | None], encoders: FrozenEncoders, most: int
) -> list[PendingPixels]:
    """Choose which of the next micro-batches are encoded together, at least the first one that has views.

    Args:
        upcoming: the views of each; None for one that has none.
        encoders: what they are encoded with.
        most: how many they may be.
    """
    some = [pixels for pixels in upcoming if pixels is not None][:most]
    return some[: joined([len(pixels.views) for pixels in some], encoders.config.views_at_once)]


def encode(encoders: FrozenEncoders, micro_batches: Sequence[PendingPixels]) -> list[Tensor]:
    """Encode the views of some micro-batches together, in full batches.

    Returns:
        For each micro-batch bf16 [views, feature_values], all NaN where the image is bad or the encoders give a NaN for
        it.
    """
    everything = [pixels.result() for pixels in micro_batches]
    features: Tensor = encoders(*(read.views for read in everything))
    parts = features.split([len(next(iter(read.views.values()))) for read in everything])
    for pixels, read, part in zip(micro_batches, everything, parts, strict=True):
        lost = part.isnan().any(1)
        for view in set(lost.nonzero().flatten().tolist()) - set(read.bad):
            pixels.report(view, "the encoders give NaN for it")
        lost[list(read.bad)] = True
        part.masked_fill_(lost[:, None], float("nan"))
    return list(parts)


class ColocatedEncoders:
    """Encoders on the language ranks: those of a replica share its views among them, then gather the features.

    In a pipeline that is done for all micro-batches of a step before the first: its stages may not wait for each other.
    """

    def __init__(
        self,
        rounds: Iterator[Round],
        groups: ProcessGroups,
        encoders: FrozenEncoders,
        pixels: PixelLoader | None,
        lookahead: int,
    ) -> None:
        self.waiting, self.received_bytes = Stopwatch(current_platform()), 0
        self._rounds, self._groups, self._encoders, self._pixels = rounds, groups, encoders, pixels
        self._reading: deque[tuple[list[DealtViews], PendingPixels | None]] = deque()
        self._ready: deque[Tensor] = deque()
        self._own: deque[Tensor] = deque()
        self._lookahead = lookahead
        self._size, self._place = dist.get_world_size(groups.model), dist.get_rank(groups.model)
        for _ in range(lookahead):
            self._read()

    def _read(self) -> None:
        """Begin to decode one more micro-batch, if there is one."""
        if (ahead := next(self._rounds, None)) is None:
            return
        views = views_in(ahead[self._groups.seat.data])
        shares = deal([[1.0] * len(views)], self._size)
        mine = [view for s in shares if s.encoder == self._place for view in views[s.first : s.first + s.count]]
        self._reading.append((shares, self._pixels.submit(mine) if self._pixels and mine else None))

    def prepare(self, count: int) -> None:
        """Encode all micro-batches of the step, in a pipeline."""
        if self._groups.layout.config.pipeline > 1:
            features = [self._encode() for _ in range(count)]
            self._ready.extend(features if self._groups.is_first_stage else [])

    def next(self) -> Tensor:
        """Take the features of the next micro-batch, encoding it unless that is done already."""
        return self._ready.popleft() if self._groups.layout.config.pipeline > 1 else self._encode()

    def _encode(self) -> Tensor:
        """Encode the next micro-batch together with all ranks of the replica."""
        shares, pending = self._reading.popleft()
        self._read()
        values, device = self._encoders.config.feature_values, self._encoders.device
        out = torch.empty(sum(share.count for share in shares), values, dtype=torch.bfloat16, device=device)
        parts = list(out.split([share.count for share in shares])) if shares else []
        with self.waiting:
            if pending is not None:
                own = parts[[share.encoder for share in shares].index(self._place)]
                own.copy_(self._own.popleft() if self._own else self._encode_ahead(pending))
            _spread(parts, [share.encoder for share in shares], self._groups.model)
        return out

    def _encode_ahead(self, pending: PendingPixels) -> Tensor:
        """Encode this rank's views of the micro-batch at hand; with it those of later ones, if that fills batches."""
        ahead = encoded_together([pending, *(later for _, later in self._reading)], self._encoders, self._lookahead)
        first, *later = encode(self._encoders, ahead)
        self._own.extend(later)
        return first
