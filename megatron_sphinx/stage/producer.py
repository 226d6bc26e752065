"""The life of an encoder rank: read, encode, send, as far ahead as the channel lets it."""

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from megatron_sphinx.data.packing import views_in
from megatron_sphinx.data.pixels import PendingPixels, wait_for
from megatron_sphinx.device import Stopwatch, current_platform
from megatron_sphinx.liveness.progress import Activity, Progress
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.stage.channel import FeatureSender, Round, encode, encoded_together, shares_of
from megatron_sphinx.stage.dealing import DealtViews
from megatron_sphinx.stage.schedule import Scheduled


class MicroBatchObserver(Protocol):
    """Watches the micro-batches of an encoder rank."""

    def micro_batch(self, views: int, read_seconds: float, encode_seconds: float, send_seconds: float) -> None:
        """Hear of a micro-batch that is encoded and sent.

        Args:
            views: that this encoder has encoded of it.
            read_seconds: that the encoder has waited for pixels so far.
            encode_seconds: that it has encoded so far.
            send_seconds: that it has waited for the language ranks so far.
        """


def produce(
    micro_batches: Iterator[Scheduled],
    *,
    encoder: int,
    encoder_count: int,
    encoders: FrozenEncoders,
    sender: FeatureSender,
    lookahead: int,
    progress: Progress,
    observer: MicroBatchObserver | None = None,
) -> None:
    """Encode this encoder's shares of every micro-batch, images decoded `lookahead` micro-batches ahead of that.

    A micro-batch without pictures costs and sends nothing. Several of few views are encoded together, and sent singly.

    Args:
        micro_batches: of all replicas, in the order in which the language ranks take them.
        encoder: number of this encoder.
        encoder_count: how many there are.
        encoders: what it encodes with.
        sender: where features go.
        lookahead: micro-batches whose images are decoded ahead.
        progress: where it notes what it is at.
        observer: hears of each micro-batch.
    """
    watches = reads, encodes, sends = [Stopwatch(current_platform()) for _ in range(3)]
    reading: deque[tuple[int, int, list[DealtViews], PendingPixels | None]] = deque()
    ready: deque[Tensor] = deque()  # features of the next micro-batches that have views

    def read() -> None:
        """Begin to decode one more micro-batch, if there is one."""
        if (upcoming := next(micro_batches, None)) is None:
            return
        step, number, ahead, pixels = upcoming
        mine, views = _own(ahead, encoder, encoder_count)
        reading.append((step, number, mine, pixels.submit(views) if pixels and views else None))

    for _ in range(lookahead):
        read()
    while reading:
        step, number, shares, pending = reading.popleft()
        progress.begin(step, number)
        read()
        if pending is not None:
            if not ready:
                ahead = encoded_together([pending, *(later for *_, later in reading)], encoders, lookahead)
                with reads:
                    wait_for(ahead)
                progress.note(Activity.ENCODING, number)
                with encodes:
                    ready.extend(encode(encoders, ahead))
            progress.note(Activity.SENDING, number)
            with sends:
                sender.send(shares, ready.popleft().split([share.count for share in shares]))
        if observer:
            observer.micro_batch(sum(share.count for share in shares), *(watch.seconds for watch in watches))
    progress.note(Activity.SENDING)
    sender.drain()


def _own(ahead: Round, encoder: int, encoder_count: int) -> tuple[list[DealtViews], list[tuple[int, int]]]:
    """Find what one encoder takes of the next micro-batches: its shares, and their views as (sample, number)."""
    mine = [share for share in shares_of(ahead, encoder_count) if share.encoder == encoder]
    return mine, [view for s in mine for view in views_in(ahead[s.replica])[s.first : s.first + s.count]]
