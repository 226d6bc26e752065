"""How much the engine takes on at once."""

from dataclasses import dataclass
from typing import Annotated

from megatron_sphinx.ranges import Range


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much the engine takes on at once.

    Attributes:
        new_tokens: that a tick computes for a replica, at most; longer prompts are computed in parts, and between
            those answers go on.
        sequences: that a replica computes at once, at most.
        picture_positions: of all pictures whose embeddings a replica keeps, at most.
        encodings: pictures that are encoded for a replica at once, at most.
        waiting: requests that may wait, at most.
        has_prefix_cache: whether a request takes what earlier ones have computed of the same beginning.
    """

    new_tokens: Annotated[int, Range(least=1, most=2**20)] = 512
    sequences: Annotated[int, Range(least=1, most=2**16)] = 64
    picture_positions: Annotated[int, Range(least=0, most=2**31)] = 2**14
    encodings: Annotated[int, Range(least=1, most=2**10)] = 2
    waiting: Annotated[int, Range(least=1, most=2**20)] = 1024
    has_prefix_cache: bool = True
