"""Blocks of a replica's cache: which sequence holds which, and what stays in those that none holds any more."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

_MOST_HOPED = 8  # blocks of a claim


def chained_key(before: bytes, tokens: Sequence[int], picture: str) -> bytes:
    """Return the key of a full block: what is in it, and in all blocks before it.

    Args:
        before: key of the block before; empty for the first one.
        tokens: ids of the block's tokens.
        picture: key of the picture that some of them are positions of; empty without.
    """
    return hashlib.blake2b(before + array("q", tokens).tobytes() + picture.encode(), digest_size=20).digest()


class Hold:
    """The blocks that a sequence holds, in the order of its tokens.

    Args:
        block: tokens of a block.

    Attributes:
        blocks: their numbers.
    """

    def __init__(self, block: int) -> None:
        self.blocks: list[int] = []
        self._block = block
        self._stretches: list[tuple[int, int]] = []  # first block, blocks

    @property
    def following(self) -> int:
        """The block behind the last one; -1 without blocks."""
        return self.blocks[-1] + 1 if self.blocks else -1

    def append(self, number: int) -> None:
        """Hold one block more, behind the others."""
        if number == self.following:
            first, blocks = self._stretches[-1]
            self._stretches[-1] = (first, blocks + 1)
        else:
            self._stretches.append((number, 1))
        self.blocks.append(number)

    def segments(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """Return where the first tokens of the sequence lie: (first place, tokens) of each stretch, in order."""
        segments = []
        for first, blocks in self._stretches:
            if tokens <= 0:
                break
            segments.append((first * self._block, min(tokens, blocks * self._block)))
            tokens -= blocks * self._block
        return tuple(segments)


class BlockPool:
    """All blocks of a replica's cache.

    A block that was computed in full can be found by its key, and held by several sequences at once. Once none holds
    it, it stays until its room is needed: of those blocks the one goes first that was let go first, and of one sequence
    the last. So what stays of a chain is always its beginning.

    Attention reads a stretch of neighbouring blocks at once, so a sequence is given neighbours where it can be, and the
    free blocks behind it are its claim: others take them only when there are no others.

    Args:
        places: tokens that the cache holds.
        block: tokens of a block.

    Attributes:
        block: tokens of a block.
        count: how many blocks there are.
    """

    def __init__(self, places: int, block: int) -> None:
        self.block, self.count = block, places // block
        self._free = set(range(self.count))  # hold nothing of use
        self._claims: dict[int, Hold] = {}  # some of the free ones
        self._holders = [0] * self.count
        self._found: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._left: OrderedDict[int, None] = OrderedDict()  # have a key, but no holder; the next to go first

    @property
    def available(self) -> int:
        """How many blocks no sequence holds."""
        return len(self._free) + len(self._left)

    @property
    def filled(self) -> int:
        """How many blocks hold something, for a sequence or for a later one."""
        return self.count - len(self._free)

    def blocks_of(self, tokens: int) -> int:
        """Return how many blocks so many tokens take."""
        return -(-tokens // self.block)

    def match(self, keys: Sequence[bytes]) -> int:
        """Return how many blocks at the beginning of a chain can be taken."""
        return next((number for number, key in enumerate(keys) if key not in self._found), len(keys))

    def room_beside(self, keys: Sequence[bytes]) -> int:
        """Return how many blocks will be available once these, which can be taken, have been."""
        return self.available - sum(self._found[key] in self._left for key in keys)

    def take(self, keys: Sequence[bytes]) -> Hold:
        """Hold the blocks of these keys, which can be taken, for a sequence that begins with them."""
        hold = Hold(self.block)
        for key in keys:
            number = self._found[key]
            self._holders[number] += 1
            self._left.pop(number, None)
            hold.append(number)
        return hold

    def grow(self, hold: Hold, count: int, hoped: int = 0) -> None:
        """Give a sequence more blocks; no more than are available.

        Args:
            hold: what it holds.
            count: blocks more.
            hoped: how many more it may want later: free ones behind the new ones become its claim.
        """
        hoped = min(hoped, _MOST_HOPED)
        is_ample = len(self._left) > self.count // 2
        self._empty(count + hoped if is_ample else count)
        while count:
            first, length = self._stretch(hold, count + hoped)
            for number in range(first, first + min(count, length)):
                self._free.remove(number)
                self._claims.pop(number, None)
                self._holders[number] = 1
                hold.append(number)
            count -= min(count, length)
        for number in range(hold.following, hold.following + hoped):
            if not self._is_open(number, hold):
                break
            self._claims[number] = hold

    def _empty(self, count: int) -> None:
        """Let go what is in blocks that no sequence holds, until so many are free or none is left."""
        while len(self._free) < count and self._left:
            number, _ = self._left.popitem(last=False)
            del self._found[self._keys.pop(number)]
            self._free.add(number)

    def _is_open(self, number: int, hold: Hold) -> bool:
        """Whether a block is free, and no other sequence's claim."""
        return number in self._free and self._claims.get(number, hold) is hold

    def _stretch(self, hold: Hold, wanted: int) -> tuple[int, int]:
        """Return the best free stretch for a sequence, as (first block, blocks); there is a free block."""
        if self._is_open(hold.following, hold):
            length = next(n for n in range(1, wanted + 1) if n == wanted or not self._is_open(hold.following + n, hold))
            return hold.following, length
        longest = (-1, 0)
        for first, length in self._open_stretches():
            if length >= wanted:
                return first, length
            longest = max(longest, (first, length), key=lambda stretch: stretch[1])
        if not longest[1]:
            self._claims.clear()
            return self._stretch(hold, wanted)
        return longest

    def _open_stretches(self) -> Iterator[tuple[int, int]]:
        """Yield the stretches of blocks that are free and nobody's claim, as (first block, blocks)."""
        first = last = -1
        for number in sorted(self._free - self._claims.keys()):
            if first >= 0 and number != last + 1:
                yield first, last + 1 - first
                first = -1
            first, last = (number if first < 0 else first), number
        if first >= 0:
            yield first, last + 1 - first

    def publish(self, hold: Hold, number: int, key: bytes) -> None:
        """Let other sequences find a block that has been computed in full, unless they find such a one already.

        Args:
            hold: of the sequence.
            number: of the block, counted from the sequence's first.
            key: of what is in it.
        """
        block = hold.blocks[number]
        if key not in self._found and block not in self._keys:
            self._found[key], self._keys[block] = block, key

    def release(self, hold: Hold) -> None:
        """Let go all that a sequence holds and claims."""
        for number in [number for number, owner in self._claims.items() if owner is hold]:
            del self._claims[number]
        for number in reversed(hold.blocks):
            self._holders[number] -= 1
            if not self._holders[number]:
                if number in self._keys:
                    self._left[number] = None
                else:
                    self._free.add(number)
