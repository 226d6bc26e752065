"""The life of an encoder rank: read, encode, send, as far ahead as the channel lets it."""

from collections import deque
from collections.abc import Callable, Iterator

from megatron_sphinx.data.pixels import PendingPixels, PixelLoader, views_in
from megatron_sphinx.device import Stopwatch, current_platform
from megatron_sphinx.liveness.progress import Doing, Progress
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.stage.channel import FeatureSender, Round, encode, shares_of
from megatron_sphinx.stage.dealing import DealtViews


def produce(
    rounds: Iterator[tuple[int, int, Round]],
    *,
    encoder: int,
    encoder_count: int,
    encoders: FrozenEncoders,
    pixels: PixelLoader | None,
    sender: FeatureSender,
    lookahead: int,
    progress: Progress,
    observe: Callable[[int, float, float, float], None] | None = None,
) -> None:
    """Encode this encoder's shares of every micro-batch, images decoded `lookahead` micro-batches ahead of that.

    A micro-batch without pictures costs nothing here and sends nothing.

    Args:
        rounds: the micro-batches of all replicas, each behind its step and its number in the step.
        encoder: number of this encoder.
        encoder_count: how many there are.
        encoders: what it encodes with.
        pixels: where it reads images.
        sender: where features go.
        lookahead: micro-batches whose images are decoded ahead.
        progress: where it notes what it is at.
        observe: is told of each micro-batch: its views here, and the seconds so far spent waiting for pixels, encoding,
            and waiting for the language ranks.
    """
    watches = reads, encodes, sends = [Stopwatch(current_platform()) for _ in range(3)]
    reading: deque[tuple[int, int, list[DealtViews], PendingPixels | None]] = deque()

    def read() -> None:
        if (found := next(rounds, None)) is None:
            return
        step, number, ahead = found
        mine = [share for share in shares_of(ahead, encoder_count) if share.encoder == encoder]
        views = [view for s in mine for view in views_in(ahead[s.replica])[s.first : s.first + s.count]]
        reading.append((step, number, mine, pixels.submit(views) if pixels and views else None))

    for _ in range(lookahead):
        read()
    while reading:
        step, number, shares, pending = reading.popleft()
        progress.begin(step, number)
        read()
        if pending is not None:
            with reads:
                pending.wait()
            progress.at(Doing.ENCODING, number)
            with encodes:
                features = encode(encoders, pending)
            progress.at(Doing.SENDING, number)
            with sends:
                sender.send(shares, features.split([share.count for share in shares]))
        if observe:
            observe(sum(share.count for share in shares), *(watch.seconds for watch in watches))
    progress.at(Doing.SENDING)
    sender.drain()
