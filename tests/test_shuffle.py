"""Orders that are looked up place by place: every item once, any place alone, nothing kept of all items."""

import random

import numpy as np
import pytest

from megatron_sphinx.data.shuffle import Permutation, Shuffle, key_of, mix

SEEDS = range(12)


def drawn(seed: int) -> Shuffle:
    rng = random.Random(seed)
    return Shuffle(rng.randint(1, 700), block=rng.randint(1, 60), window=rng.randint(1, 7), key=rng.getrandbits(64))


@pytest.mark.parametrize("size", [*range(1, 40), 1000, 4097])
def test_a_permutation_has_every_item_once(size):
    for key in range(5):
        assert sorted(Permutation(size, key_of(size, key))(np.arange(size))) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 30])
def test_a_permutation_puts_every_item_anywhere(size):
    counts, keys = np.zeros((size, size)), 3000
    for key in range(keys):
        counts[np.arange(size), Permutation(size, key_of("anywhere", key))(np.arange(size))] += 1
    expected = keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_the_order_is_the_same_everywhere_for_ever():
    """A run that is resumed with other versions of libraries must find its place."""
    assert mix(np.array([0, 1, 2**63], np.uint64)).tolist() == [0, 6238072747940578789, 2720858781877447050]
    shuffle = Shuffle(100, block=8, window=3, key=7)
    assert shuffle.take(95, 10).tolist() == [28, 31, 30, 26, 27, 29, 7, 30, 27, 20]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_epoch_has_every_item_once_and_its_own_order(seed):
    shuffle = drawn(seed)
    epochs = [shuffle.take(epoch * shuffle.items, shuffle.items) for epoch in range(3)]
    for items in epochs:
        assert sorted(items) == list(range(shuffle.items))
    if shuffle.items > 20:
        assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_any_place_is_found_without_those_before_it(seed):
    shuffle, rng = drawn(seed), random.Random(seed)
    whole = shuffle.take(0, 3 * shuffle.items)
    for _ in range(20):
        start = rng.randrange(3 * shuffle.items)
        count = rng.randint(0, 3 * shuffle.items - start)
        assert np.array_equal(shuffle.take(start, count), whole[start : start + count])


def test_a_window_reads_few_runs_of_neighbours():
    shuffle = Shuffle(400_000_000, block=1024, window=64, key=1)
    for start in (0, 65536 * 17, 65536 * 6000):
        items = np.sort(shuffle.take(start, 65536))
        assert len(np.unique(items // 1024)) == 64
        assert len(items) == len(np.unique(items))
        assert items[-1] - items[0] > 100_000_000  # they come from all over the data
        places = shuffle.take(start, 65536) % 1024
        assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02  # and do not come in their order
