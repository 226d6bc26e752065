"""Computes ticks: in one process, or on all ranks of a job, of which the first one says what is computed."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sphinx.generation.expert_orders import Collect, ExpertOrder, WatchedExperts
from megatron_sphinx.generation.pictures import views_of_picture
from megatron_sphinx.generation.requests import Picture
from megatron_sphinx.generation.runner import ModelRunner
from megatron_sphinx.generation.sampling import draw, score
from megatron_sphinx.generation.ticks import Outcome, Piece, Tick
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.parallel.groups import ProcessGroups

_FEATURES = 1  # tag of features, which other messages between two ranks must not be taken for


@dataclass(frozen=True)
class _Encode:
    """Tells the ranks of a replica's first stage to encode a picture, each some of its views."""

    picture: Picture
    replica: int


@dataclass(frozen=True)
class _Take:
    """Tells the ranks of a replica's first stage to take the features of a picture that an encoder rank has."""

    picture: Picture
    replica: int
    encoder: int


class LanguageRankExecutor:
    """What a language rank does in a tick; on the first rank an Executor, on the others it follows.

    Args:
        runner: this rank's shard of the model.
        groups: its process groups.
        encoders: the frozen encoders, where this rank encodes; None where encoder ranks do, or nobody can.
        places: see Executor.
        block: see Executor.
        positions: see Executor.
    """

    def __init__(
        self,
        runner: ModelRunner,
        groups: ProcessGroups,
        encoders: FrozenEncoders | None,
        *,
        places: int,
        block: int,
        positions: int,
    ) -> None:
        self._runner, self._groups, self._encoders = runner, groups, encoders
        self.replicas, self.stages = groups.layout.data, groups.layout.config.pipeline
        self.places, self.block, self.positions = places, block, positions
        self._under_way: deque[Tick | None] = deque([None] * self.stages, maxlen=self.stages)  # newest first
        self._ready: list[tuple[str, int]] = []
        self._remote = [_RemoteEncoder(groups, number) for number in range(groups.layout.config.encoder)]
        self._is_alone = groups.layout.language == 1

    # on the first rank

    def tick(self, tick: Tick) -> Sequence[Sequence[Outcome]] | None:
        """Compute a tick; see Executor."""
        self._tell(tick)
        own = self._compute(tick)
        done = self._under_way[-1]
        if done is None:
            return None
        return [self._outcomes(replica, own) if pieces else () for replica, pieces in enumerate(done.pieces)]

    def encode(self, picture: Picture, replica: int) -> None:
        """Begin to encode a picture; see Executor."""
        if self._remote:
            min(self._remote, key=lambda remote: remote.load).begin(picture, replica)
            return
        order = _Encode(picture, replica)
        self._tell(order)
        self._obey(order)
        self._ready.append((picture.key, replica))

    def encoded(self) -> Sequence[tuple[str, int]]:
        """Return the pictures that are ready; see Executor."""
        for number, remote in enumerate(self._remote):
            for picture, replica in remote.done():
                order = _Take(picture, replica, number)
                self._tell(order)
                self._obey(order)
                self._ready.append((picture.key, replica))
        ready, self._ready = self._ready, []
        return ready

    def order_experts(self, order: ExpertOrder) -> list[WatchedExperts]:
        """Have all ranks obey an order about MoE experts, while no request is under way; return what each has seen."""
        self._tell(order)
        own = self._groups.seat.rank
        found = [self._runner.experts.obey(order)]
        for rank in self._first_tensor_ranks():
            if rank != own and isinstance(order, Collect):
                heard: list[Any] = [None]
                dist.recv_object_list(heard, src=rank, group=self._groups.storage)
                found += heard
        return [one for one in found if one is not None]

    def close(self) -> None:
        """Let all other ranks go."""
        for remote in self._remote:
            remote.close()
        self._tell(None)

    # on the others

    def follow(self) -> None:
        """Do what the first rank says, until that closes."""
        while (order := self._hear()) is not None:
            if isinstance(order, Tick):
                outcomes = self._compute(order)
                if outcomes is not None:
                    dist.send_object_list([outcomes], dst=0, group=self._groups.storage)
            elif isinstance(order, ExpertOrder):
                seen = self._runner.experts.obey(order)
                if isinstance(order, Collect) and not self._groups.seat.tensor:
                    dist.send_object_list([seen], dst=0, group=self._groups.storage)
            else:
                self._obey(order)

    # on all

    def _first_tensor_ranks(self) -> list[int]:
        """List the first of the ranks that share each stage's matrices, of every replica."""
        layout = self._groups.layout
        return [
            layout.rank_of(data=replica, tensor=0, pipeline=stage)
            for replica in range(self.replicas)
            for stage in range(self.stages)
        ]

    def _tell(self, order: object) -> None:
        if not self._is_alone:
            dist.broadcast_object_list([order], src=0, group=self._groups.storage)

    def _hear(self) -> Any:
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._groups.storage)
        return heard[0]

    def _compute(self, tick: Tick) -> list[Outcome] | None:
        """Compute this rank's part of the tick that is at its stage; what came of it, on the rank that draws."""
        groups, seat = self._groups, self._groups.seat
        self._under_way.appendleft(tick)
        if groups.is_first_stage:
            for key in tick.forgotten[seat.data]:
                self._runner.forget(key)
        at_stage = self._under_way[seat.pipeline]
        if at_stage is None:
            return None
        pieces = at_stage.pieces[seat.data]
        logits = self._runner.run(pieces)
        if logits is None or seat.tensor:
            return None
        return outcomes_of(logits, pieces)

    def _outcomes(self, replica: int, own: list[Outcome] | None) -> list[Outcome]:
        """Return what a replica drew: this rank's own, or what the rank says that drew it."""
        rank = self._groups.layout.rank_of(data=replica, tensor=0, pipeline=self.stages - 1)
        if rank == self._groups.seat.rank:
            assert own is not None, "the first rank has drawn nothing, though it draws"
            return own
        heard: list[Any] = [None]
        dist.recv_object_list(heard, src=rank, group=self._groups.storage)
        outcomes: list[Outcome] = heard[0]
        return outcomes

    @torch.inference_mode()
    def _obey(self, order: _Encode | _Take) -> None:
        """Get the features of a picture, on the ranks that embed it."""
        groups, picture = self._groups, order.picture
        if not groups.is_first_stage or groups.seat.data != order.replica:
            return
        if isinstance(order, _Encode):
            features = self._encode_together(picture)
        else:
            features = torch.empty(len(picture.encoded), self._runner.feature_values, dtype=torch.bfloat16)
            dist.recv(features, src=groups.layout.encoder_rank(order.encoder), group=groups.control, tag=_FEATURES)
        self._runner.add_picture(picture.key, features, picture.encoded)

    def _encode_together(self, picture: Picture) -> Tensor:
        """Encode the views of a picture, each on one of the tensor ranks: [views, feature_values]."""
        encoders, tensor = self._encoders, self._groups.layout.config.tensor
        assert encoders is not None, "there are neither encoders nor encoder ranks"
        views, own = views_of_picture(picture, encoders.config), slice(self._groups.seat.tensor, None, tensor)
        if tensor == 1:
            alone: Tensor = encoders(views)
            return alone
        count = len(picture.encoded)
        features = torch.zeros(count, encoders.config.feature_values, dtype=torch.bfloat16, device=encoders.device)
        if len(range(count)[own]):
            features[own] = encoders({side: pixels[own] for side, pixels in views.items()})
        dist.all_reduce(features, group=self._groups.tensor)
        return features


class _RemoteEncoder:
    """An encoder rank, as the first rank sees it: a thread gives it one picture after the other, and waits for it."""

    def __init__(self, groups: ProcessGroups, number: int) -> None:
        self._rank, self._group = groups.layout.encoder_rank(number), groups.control
        self._orders: SimpleQueue[tuple[Picture, int] | None] = SimpleQueue()
        self._finished: SimpleQueue[tuple[Picture, int] | Exception] = SimpleQueue()
        self.load = 0
        self._thread = Thread(target=self._work, name=f"encoder {number}", daemon=True)
        self._thread.start()

    def begin(self, picture: Picture, replica: int) -> None:
        """Let the rank encode a picture when it has encoded those before it."""
        self.load += 1
        self._orders.put((picture, replica))

    def done(self) -> list[tuple[Picture, int]]:
        """Return what has been encoded since this was asked last.

        Raises:
            Exception: what the connection to the rank broke with.
        """
        finished = []
        while not self._finished.empty():
            one = self._finished.get()
            if isinstance(one, Exception):
                raise one
            finished.append(one)
            self.load -= 1
        return finished

    def close(self) -> None:
        """Let the rank go."""
        self._orders.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            order = self._orders.get()
            try:
                dist.send_object_list([order], dst=self._rank, group=self._group)
                if order is None:
                    return
                dist.recv_object_list([None], src=self._rank, group=self._group)
            except Exception as error:  # the engine ends with it
                self._finished.put(error)
                return
            self._finished.put(order)


def serve_encoder(encoders: FrozenEncoders, groups: ProcessGroups) -> None:
    """Encode on an encoder rank what the first rank says, until that closes."""
    layout, sending = groups.layout, list[tuple[dist.Work | None, Tensor]]()
    while True:
        heard: list[Any] = [None]
        dist.recv_object_list(heard, src=0, group=groups.control)
        if heard[0] is None:
            break
        picture, replica = heard[0]
        features = encoders(views_of_picture(picture, encoders.config)).cpu()
        dist.send_object_list([True], dst=0, group=groups.control)
        for work, _ in sending:
            if work is not None:
                work.wait()
        ranks = [layout.rank_of(data=replica, tensor=tensor) for tensor in range(layout.config.tensor)]
        sending = [(dist.isend(features, dst=rank, group=groups.control, tag=_FEATURES), features) for rank in ranks]
    for work, _ in sending:
        if work is not None:
            work.wait()


def outcomes_of(logits: Tensor, pieces: Sequence[Piece]) -> list[Outcome]:
    """Draw the next tokens of pieces, and look up the log-probabilities of their targets.

    Args:
        logits: fp32 [rows, vocabulary], as ModelRunner.run gives them.
        pieces: what they were computed of.
    """
    drawing: list[int] = []
    rows: list[int] = []
    asked: list[int] = []
    row = 0
    for piece in pieces:
        places = {number: row + place for place, number in enumerate(piece.scored)}
        rows += [places[number] for number, _ in piece.targets]
        asked += [token for _, token in piece.targets]
        row += len(places)
        if piece.draw is not None:
            drawing.append(row)
            row += 1
    drawn = iter(draw(logits[drawing], [piece.draw for piece in pieces if piece.draw is not None]))
    scores = iter(score(logits, rows, asked))
    return [
        Outcome(
            next(drawn) if piece.draw is not None else None,
            tuple(next(scores) for _ in piece.targets),
        )
        for piece in pieces
    ]
