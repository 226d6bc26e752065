"""Endless seeded orders in which any place can be looked up: arithmetic only, no list of all items.

An epoch cuts the items into blocks of neighbours, draws an order of the blocks, and joins so many blocks to a window.
Inside a window the items come in a drawn order; windows come one behind the other. So a reader touches few places of
the data at a time, each once an epoch, and the order of 400 million items takes no memory.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Hashes = NDArray[np.uint64]

_ROUNDS = 8  # of the permutation; with 4, small ones are visibly uneven


def key_of(*parts: object) -> int:
    """Return a 64-bit key that follows from any values whose text is stable."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")


def mix(values: Hashes) -> Hashes:
    """Hash 64-bit numbers, one to one.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A random-looking order of 0 … size - 1, looked up place by place.

    A Feistel network on the pairs (n // width, n % width), whose two halves may have different ranges. What falls
    outside the size is sent through again. Stable: no library's generator decides the order, so a run resumes with
    any version of numpy.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._height = isqrt(max(size - 1, 0)) + 1
        self._width = -(-size // self._height)
        self._keys = mix(np.arange(_ROUNDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))

    def __call__(self, places: Numbers) -> Numbers:
        """Return the items at some places of the order."""
        items = self._once(places)
        while (outside := items >= self.size).any():
            items[outside] = self._once(items[outside])
        return items

    def _once(self, places: Numbers) -> Numbers:
        """Send places through the network once; what comes out may lie outside the size."""
        high, low = (half.astype(np.uint64) for half in np.divmod(places, self._width))
        for number, key in enumerate(self._keys):
            if number % 2:
                low = (low + mix(high ^ key) % np.uint64(self._width)) % np.uint64(self._width)
            else:
                high = (high + mix(low ^ key) % np.uint64(self._height)) % np.uint64(self._height)
        return (high * np.uint64(self._width) + low).astype(np.int64)


@dataclass(frozen=True)
class Window:
    """Some blocks of an epoch, whose items come in a drawn order.

    Attributes:
        begins: first item of each block, in the drawn order of the blocks.
        sizes: how many items each block has.
        key: what the order of the items follows from.
    """

    begins: Numbers
    sizes: Numbers
    key: int

    def order(self, size: int) -> Numbers:
        """Return a drawn order of `size` things that the window holds."""
        return Permutation(size, self.key)(np.arange(size, dtype=np.int64))

    def spread(self, owners: Numbers) -> Numbers:
        """Return a drawn order of things in which those of one owner lie at equal distances.

        The things of an owner come in a drawn order too, and where the first of them lies is drawn for each owner. So a
        stretch of the order holds no more things of an owner than its share of them, and one.

        Args:
            owners: int64 [things], whose each thing is.
        """
        order = self.order(len(owners))
        _, owner, counts = np.unique(owners[order], return_inverse=True, return_counts=True)
        by_owner = np.argsort(owner, kind="stable")
        turn = np.empty(len(order), np.int64)  # of a thing among its owner's
        turn[by_owner] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        distance = np.uint64(2**64 - 1) // counts.astype(np.uint64)
        first = mix(np.arange(len(counts), dtype=np.uint64) ^ np.uint64(self.key)) % distance
        places = first[owner] + turn.astype(np.uint64) * distance[owner]
        return np.asarray(order[np.argsort(places, kind="stable")])

    def draw(self, places: Numbers) -> Numbers:
        """Return which items, counted through the blocks of the window, are at some places of its drawn order."""
        return Permutation(int(self.sizes.sum()), self.key)(places)

    def item(self, drawn: Numbers) -> Numbers:
        """Return the items whose count through the blocks of the window is given, as `draw` returns it."""
        ends = np.cumsum(self.sizes)
        block = np.searchsorted(ends, drawn, side="right")
        return np.asarray(self.begins[block] + drawn - (ends[block] - self.sizes[block]))


class Shuffle:
    """An endless order of items, in which every epoch has all of them once.

    Args:
        items: how many items there are.
        block: neighbours that stay in one window.
        window: blocks of a window.
        key: what the order follows from.
    """

    def __init__(self, items: int, *, block: int, window: int, key: int) -> None:
        self.items, self.block, self.window, self.key = items, block, window, key
        self._full, self._rest = divmod(items, block)
        self._slots = self._full + (self._rest > 0)

    def spans(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield where places `start` to `start + count` of the order are: (epoch, window, first place in it, count)."""
        while count:
            epoch, place = divmod(start, self.items)
            number = min(place // (self.window * self.block), (self._slots - 1) // self.window)
            if place >= self._begin(epoch, number + 1):  # the block that is not full lies before it
                number += 1
            begin = self._begin(epoch, number)
            taken = min(count, self._begin(epoch, number + 1) - place)
            yield epoch, number, place - begin, taken
            start, count = start + taken, count - taken

    def open(self, epoch: int, number: int) -> Window:
        """Return a window of an epoch by its number."""
        slots = np.arange(number * self.window, min((number + 1) * self.window, self._slots), dtype=np.int64)
        short = self._short(epoch)
        order = Permutation(self._full, key_of(self.key, epoch))
        blocks = np.full(len(slots), self._full, np.int64)
        is_full = slots != short
        blocks[is_full] = order((slots - (slots > short))[is_full])
        sizes = np.where(is_full, self.block, self._rest)
        return Window(blocks * self.block, sizes, key_of(self.key, epoch, number))

    def take(self, start: int, count: int) -> Numbers:
        """Return items `start` to `start + count` of the endless order."""
        parts = [
            window.item(window.draw(np.arange(first, first + taken, dtype=np.int64)))
            for epoch, number, first, taken in self.spans(start, count)
            for window in [self.open(epoch, number)]
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _short(self, epoch: int) -> int:
        """Return where the block that is not full stands in an epoch; behind all blocks where every block is full."""
        return key_of(self.key, epoch, "short") % self._slots if self._rest else self._slots

    def _begin(self, epoch: int, number: int) -> int:
        """Return the first place of a window in its epoch."""
        slot = min(number * self.window, self._slots)
        return slot * self.block - (self.block - self._rest if self._short(epoch) < slot else 0)
