"""The embeddings of pictures that a replica has: which are being made, which stay, which go."""

from collections import Counter, OrderedDict
from collections.abc import Container

from megatron_sphinx.generation.requests import Picture


class EmbeddingCache:
    """Which pictures' embeddings a replica has, or soon will; those used last go last.

    Args:
        positions: of all pictures together, at most; a larger picture stands alone.
        at_once: how many pictures may be in the making.
    """

    def __init__(self, positions: int, at_once: int) -> None:
        self._limit, self._at_once = positions, at_once
        self._positions: OrderedDict[str, int] = OrderedDict()  # used longest ago first
        self._ready: set[str] = set()
        self._users = Counter[str]()
        self._forgotten: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._positions

    def is_ready(self, key: str) -> bool:
        """Whether the embeddings of a picture can be used."""
        return key in self._ready

    def come(self, key: str) -> None:
        """Note that a picture that was in the making is ready."""
        self._ready.add(key)

    def touch(self, key: str) -> None:
        """Note that a picture is wanted."""
        self._positions.move_to_end(key)

    def use(self, key: str) -> None:
        """Keep a picture for a sequence."""
        self._users[key] += 1

    def leave(self, key: str) -> None:
        """Keep a picture no longer for a sequence that used it."""
        self._users[key] -= 1

    def begin(self, picture: Picture, others: Container[str]) -> bool:
        """Return whether a picture can be begun now, and count it as begun.

        Where there is no room, pictures go that are neither in use nor among `others`; the answer is False all the
        same, since all ranks must be told before another takes their room.
        """
        if len(self._positions) - len(self._ready) >= self._at_once:
            return False
        if self._has_room(picture):
            self._positions[picture.key] = picture.positions
            return True
        for key in [key for key in self._positions if key in self._ready and not self._users[key]]:
            if key not in others:
                del self._positions[key]
                self._ready.remove(key)
                self._forgotten.append(key)
                if self._has_room(picture):
                    break
        return False

    def _has_room(self, picture: Picture) -> bool:
        """Whether a picture fits beside those that are there."""
        return not self._positions or sum(self._positions.values()) + picture.positions <= self._limit

    def told(self) -> tuple[str, ...]:
        """Return the pictures that went since this was asked last."""
        forgotten, self._forgotten = tuple(self._forgotten), []
        return forgotten
