"""Gradients on their way from backward to the fp32 partition of the rank that updates the weights: summed, moved once.

DeepSpeed's own way copies a gradient seven times, some 55 bytes for each weight and micro-batch. Here one replica adds
a gradient to its partition where it is, and several copy it once into an fp32 bucket that is reduced to its owner.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from megatron_sphinx.training.memory import BUCKET


@dataclass(frozen=True)
class PartitionedGroup:
    """Weights of the optimizer that lie one behind the other, cut into as many parts as they have copies.

    Attributes:
        weights: what is in it.
        offsets: where each weight begins.
        part: numbers in each rank's part, the last one filled up.
        copies: the ranks that hold these weights; rank n of them updates part n.
    """

    weights: Sequence[nn.Parameter]
    offsets: Sequence[int]
    part: int
    copies: dist.ProcessGroup


@dataclass(frozen=True)
class _Piece:
    """Neighbouring numbers of a bucket that one rank updates."""

    owner: int
    begin: int  # in the bucket
    count: int
    target: int  # in the owner's part


@dataclass
class _Bucket:
    """Numbers that wait to be reduced together, or are being reduced."""

    values: Tensor
    filled: int = 0
    pieces: list[_Piece] = field(default_factory=list)
    works: list[dist.Work] = field(default_factory=list)


class _GroupGradient:
    """The gradient of one group: this rank's part of it, and the buckets in which the other parts leave."""

    def __init__(self, group: PartitionedGroup, device: torch.device) -> None:
        self.group, self._device = group, device
        self.size, self.rank = dist.get_world_size(group.copies), dist.get_rank(group.copies)
        self.part: Tensor | None = None  # from the first gradient of a step to its update
        self.buckets: list[_Bucket] = []  # the last one is being filled, the one before it reduced
        self._begun: set[int] = set()  # with one copy: where in the part the weights begin that have a gradient

    def own(self) -> Tensor:
        """This rank's part, fp32 [group.part]; zeros where nothing has come yet."""
        if self.part is None:
            self.part = torch.zeros(self.group.part, dtype=torch.float32, device=self._device)
        return self.part

    def add(self, start: int, gradient: Tensor) -> None:
        """Add numbers, [count] of any type, that begin at `start` in the group."""
        if self.size == 1:
            self._add_here(start, gradient)
            return
        while len(gradient):
            bucket = self._bucket_with_room()
            owner, target = divmod(start, self.group.part)
            count = min(len(gradient), self.group.part - target, len(bucket.values) - bucket.filled)
            bucket.values.narrow(0, bucket.filled, count).copy_(gradient[:count])
            bucket.pieces.append(_Piece(owner, bucket.filled, count, target))
            bucket.filled += count
            start, gradient = start + count, gradient[count:]

    def _add_here(self, start: int, gradient: Tensor) -> None:
        """Add the whole gradient of a weight to the part; the first one is written, so that no zeros are before it."""
        if self.part is None:
            self.part = torch.empty(self.group.part, dtype=torch.float32, device=self._device)
        target = self.part.narrow(0, start, len(gradient))
        if start in self._begun:
            target.add_(gradient)
        else:
            target.copy_(gradient)
            self._begun.add(start)

    def _fill_up(self) -> None:
        """Write zeros where no gradient has come."""
        part, end = self.own(), 0
        for weight, offset in zip(self.group.weights, self.group.offsets, strict=True):
            if offset in self._begun:
                if end < offset:
                    part[end:offset].zero_()
                end = offset + weight.numel()
            self._begun.add(offset)
        part[end:].zero_()

    def clear(self) -> None:
        """Forget the sum, and give its memory back."""
        self.part, self._begun = None, set()

    def _bucket_with_room(self) -> _Bucket:
        """The bucket to fill; where the last one is full it is reduced while the one before it is filled anew."""
        if self.buckets and self.buckets[-1].filled < len(self.buckets[-1].values):
            return self.buckets[-1]
        if self.buckets:
            self._reduce(self.buckets[-1])
        if len(self.buckets) < 2:
            size = min(BUCKET, sum(weight.numel() for weight in self.group.weights))
            self.buckets.append(_Bucket(torch.empty(size, dtype=torch.float32, device=self._device)))
        else:
            self.buckets.reverse()
            self._settle(self.buckets[-1])
        return self.buckets[-1]

    def _reduce(self, bucket: _Bucket) -> None:
        """Begin to sum up a bucket over the copies, each run of neighbouring pieces at the rank that updates them."""
        for owner, run in groupby(bucket.pieces, key=lambda piece: piece.owner):
            pieces = list(run)
            begin, end = pieces[0].begin, pieces[-1].begin + pieces[-1].count
            work = dist.reduce(bucket.values[begin:end], group_dst=owner, group=self.group.copies, async_op=True)
            assert work is not None
            bucket.works.append(work)

    def _settle(self, bucket: _Bucket) -> None:
        """Add what a bucket has for this rank to its part, once it is summed up; the bucket is empty then."""
        for work in bucket.works:
            work.wait()
        for piece in bucket.pieces:
            if piece.owner == self.rank:
                reduced = bucket.values.narrow(0, piece.begin, piece.count)
                self.own().narrow(0, piece.target, piece.count).add_(reduced)
        bucket.filled, bucket.pieces, bucket.works = 0, [], []

    def finish(self) -> None:
        """Reduce what is left, and give the buckets' memory back."""
        for bucket in self.buckets:
            if bucket.pieces and not bucket.works:
                self._reduce(bucket)
        for bucket in self.buckets:
            self._settle(bucket)
        self.buckets = []
        if self.size == 1:
            self._fill_up()
        self.own()


class PartitionedGradients:
    """The sum of the gradients of a step's micro-batches and replicas, of which each rank keeps its part, in fp32.

    All ranks that hold a weight add its gradients in one order. What is added is the sum over the replicas, not their
    mean. A rank holds 4 bytes for each number of its part, and with several replicas two buckets of at most `BUCKET`
    numbers of 4 bytes for each group, from the first gradient of a step until `finish`.

    Args:
        groups: the optimizer's groups of weights, as they are cut.
        device: where the weights are.

    Source: ZeRO, arXiv:1910.02054, section 5.2.
    """

    def __init__(self, groups: Sequence[PartitionedGroup], device: torch.device) -> None:
        self._groups = [_GroupGradient(group, device) for group in groups]
        self._places = {
            weight: (own, offset)
            for own in self._groups
            for weight, offset in zip(own.group.weights, own.group.offsets, strict=True)
        }

    def take_from(self, weight: nn.Parameter) -> None:
        """Add a weight's gradient to the sum, and take it off the weight; nothing where it has none."""
        if weight.grad is None:
            return
        with record_function("gradients"):
            group, offset = self._places[weight]
            gradient, weight.grad = weight.grad, None
            group.add(offset, gradient.reshape(-1))

    def take_in_backward(self) -> None:
        """Take every gradient from now on in the moment in which backward has it."""
        for weight in self._places:
            weight.register_post_accumulate_grad_hook(self.take_from)

    def take_all(self) -> None:
        """Take the gradients that lie beside their weights, the last weight's first, as backward has them."""
        for weight in reversed(self._places):
            self.take_from(weight)

    def finish(self) -> None:
        """Let all that was added arrive; every rank that holds the weights calls this, together."""
        with record_function("gradients"):
            for group in self._groups:
                group.finish()

    def parts(self) -> list[Tensor]:
        """Give this rank's part of each group, fp32 [part], after `finish`; it may be changed in place."""
        return [group.own() for group in self._groups]

    def clear(self) -> None:
        """Forget the sum, and give its memory back."""
        for group in self._groups:
            group.clear()

    def buffers(self) -> Iterator[Tensor]:
        """Give the buckets that there are just now."""
        return (bucket.values for group in self._groups for bucket in group.buckets)
