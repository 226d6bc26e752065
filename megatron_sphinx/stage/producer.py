"""The life of an encoder rank: read, encode, send, as far ahead as the channel lets it."""

from collections import deque
from collections.abc import Iterator

from megatron_sphinx.data.loader import PendingPixels, PixelLoader, views_in
from megatron_sphinx.model.encoders import FrozenEncoders
from megatron_sphinx.stage.channel import FeatureSender, Round, encode, shares_of
from megatron_sphinx.stage.dealing import Share


def produce(
    rounds: Iterator[Round],
    *,
    encoder: int,
    encoder_count: int,
    encoders: FrozenEncoders,
    pixels: PixelLoader | None,
    sender: FeatureSender,
    lookahead: int,
) -> None:
    """Encode this encoder's shares of every micro-batch, images decoded `lookahead` micro-batches ahead of that.

    A micro-batch without pictures costs nothing here and sends nothing.
    """
    reading: deque[tuple[list[Share], PendingPixels | None]] = deque()

    def read() -> None:
        if (ahead := next(rounds, None)) is None:
            return
        mine = [share for share in shares_of(ahead, encoder_count) if share.encoder == encoder]
        views = [view for s in mine for view in views_in(ahead[s.replica])[s.first : s.first + s.count]]
        reading.append((mine, pixels.submit(views) if pixels and views else None))

    for _ in range(lookahead):
        read()
    while reading:
        shares, pending = reading.popleft()
        read()
        if pending is not None:
            sender.send(shares, encode(encoders, pending).split([share.count for share in shares]))
    sender.drain()
