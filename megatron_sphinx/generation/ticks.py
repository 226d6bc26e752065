"""What the first rank tells all ranks to compute next: a tick of the engine, and what comes of it.

The first rank alone decides. A pipeline of n stages has n ticks under way: stage s computes the tick that stage 0
computed s ticks before, so a sequence may be in one of any n consecutive ticks only, and every stage always has work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_sphinx.generation.requests import Picture, TokenLogprob


@dataclass(frozen=True)
class Draw:
    """How the token behind a piece is drawn.

    Attributes:
        seed: of the answer.
        number: of the token in the answer, counted from 0.
        temperature: see Sampling, as are the next ones.
        top_k: see above.
        top_p: see above.
        repetition_penalty: see above.
        seen: ids that the penalty is for, each once; empty without a penalty.
        top_logprobs: see Sampling.
    """

    seed: int
    number: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seen: tuple[int, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """New tokens of a sequence that a tick computes: a prompt, a part of one, or the token that was drawn last.

    Attributes:
        tokens: ids of the new tokens, 0 at a picture's positions.
        start: how many tokens of the sequence are in the cache.
        segments: where in the cache the sequence lies, those tokens and the new ones: (first place, tokens) of each
            stretch, in order; neighbouring stretches are one.
        picture: key of the picture whose positions are 1 to its number of positions in the sequence; None where no new
            token stands at one.
        draw: how the next token is drawn; None where the prompt goes on in a later tick, or is only scored.
        targets: (number of a new token, id): the log-probability of which ids behind which new tokens is asked for;
            those behind one token stand together.
        mark: see Prompt.
    """

    tokens: tuple[int, ...]
    start: int
    segments: tuple[tuple[int, int], ...]
    picture: str | None = None
    draw: Draw | None = None
    targets: tuple[tuple[int, int], ...] = ()
    mark: int | None = None

    @property
    def scored(self) -> tuple[int, ...]:
        """Numbers of the new tokens behind which there are targets, each once."""
        return tuple(dict.fromkeys(number for number, _ in self.targets))


@dataclass(frozen=True)
class Outcome:
    """What a piece gave.

    Attributes:
        drawn: the next token, its log-probability 0.0 where none was asked for; None where none was to be drawn.
        scores: log-probabilities of the targets, in nats.
    """

    drawn: TokenLogprob | None
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tick:
    """What all ranks compute together.

    Attributes:
        pieces: of each replica, those that it computes; a replica may have none.
        forgotten: of each replica, keys of pictures whose embeddings go, before the pieces are computed.
    """

    pieces: tuple[tuple[Piece, ...], ...]
    forgotten: tuple[tuple[str, ...], ...]


class Executor(Protocol):
    """Computes ticks, on this process or on all ranks of a job.

    Attributes:
        replicas: how many sequences can be computed by ranks of their own; a sequence stays with its replica.
        stages: pipeline stages: how many ticks are under way.
        places: how many tokens the cache of a replica holds, a multiple of `block`.
        block: tokens of a block of the cache.
        positions: the longest sequence that the model takes.
    """

    replicas: int
    stages: int
    places: int
    block: int
    positions: int

    def tick(self, tick: Tick) -> Sequence[Sequence[Outcome]] | None:
        """Compute a tick; what the tick before `stages` - 1 others gave, replica by replica, piece by piece.

        None where there was no such tick. A tick without pieces moves those that are under way on.
        """

    def encode(self, picture: Picture, replica: int) -> None:
        """Begin to encode a picture for a replica that does not have its embeddings."""

    def encoded(self) -> Sequence[tuple[str, int]]:
        """Return the pictures (key, replica) that are ready since this was asked last; pieces may have them now."""
