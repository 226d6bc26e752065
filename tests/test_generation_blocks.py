"""Blocks: shared by their content, kept until their room is needed, neighbours where they can be."""

import random

import pytest

from megatron_sphinx.generation.blocks import BlockPool, Hold, chained_key


def keys_of(*tokens, picture=""):
    keys = [b""]
    for token in tokens:
        keys.append(chained_key(keys[-1], [token], picture))
    return keys[1:]


def filled(pool, keys):
    """A sequence that has computed blocks of these keys."""
    hits = pool.match(keys)
    hold = pool.take(keys[:hits])
    pool.grow(hold, len(keys) - hits)
    for number, key in enumerate(keys):
        pool.publish(hold, number, key)
    return hold


def test_a_key_is_of_the_block_and_of_all_before_it():
    keys = {
        chained_key(before, tokens, picture)
        for before in (b"", b"x" * 20)
        for tokens in ([1, 2], [2, 1], [258], [1, 2, 0])
        for picture in ("", "a" * 64, "b" * 64)
    }
    assert len(keys) == 24


def test_segments_join_neighbours_and_end_with_the_tokens():
    hold = Hold(4)
    for number in (3, 4, 5, 9, 8, 0):
        hold.append(number)
    assert hold.segments(24) == ((12, 12), (36, 4), (32, 4), (0, 4))
    assert hold.segments(14) == ((12, 12), (36, 2))
    assert hold.segments(12) == ((12, 12),)
    assert hold.segments(5) == ((12, 5),)


def test_a_chain_is_found_from_its_beginning_only():
    pool = BlockPool(80, 8)
    hold = filled(pool, keys_of(1, 2, 3))
    assert [pool.match(keys_of(*tokens)) for tokens in ([1, 2, 3, 4], [1, 2, 4], [2, 3], [])] == [3, 2, 0, 0]
    assert pool.match(keys_of(1, 2, 3, picture="a")) == 0
    other = pool.take(keys_of(1, 2))
    assert other.blocks == hold.blocks[:2]
    pool.release(hold)
    pool.release(other)
    assert pool.match(keys_of(1, 2, 3)) == 3
    assert (pool.available, pool.filled) == (10, 3)


def test_what_was_let_go_first_goes_first_and_of_a_chain_its_end():
    pool = BlockPool(6, 1)
    first, second = filled(pool, keys_of(1, 2, 3)), filled(pool, keys_of(4, 5))
    pool.release(first)
    pool.release(second)
    pool.release(pool.take(keys_of(1)))  # used again
    found = []
    for wanted in range(2, 7):
        hold = Hold(1)
        pool.grow(hold, wanted)
        found.append((pool.match(keys_of(1, 2, 3)), pool.match(keys_of(4, 5))))
        pool.release(hold)
    assert found == [(2, 2), (1, 2), (1, 1), (1, 0), (0, 0)]


def test_a_block_in_use_stays():
    pool = BlockPool(4, 1)
    pool.release(filled(pool, keys_of(1, 2)))
    hold = pool.take(keys_of(1))
    assert pool.available == 3
    assert pool.room_beside(keys_of(1, 2)) == 2
    pool.grow(Hold(1), 3)
    assert pool.match(keys_of(1, 2)) == 1
    assert pool.take(keys_of(1)).blocks == hold.blocks


def test_equal_content_that_was_computed_twice_is_found_once():
    pool = BlockPool(4, 1)
    holds = [Hold(1), Hold(1)]
    for hold in holds:
        pool.grow(hold, 1)
        pool.publish(hold, 0, keys_of(1)[0])
    assert pool.take(keys_of(1)).blocks == holds[0].blocks
    pool.release(holds[1])
    assert pool.available == 3


def test_sequences_grow_in_one_stretch_each():
    pool = BlockPool(64, 1)
    holds = [Hold(1) for _ in range(4)]
    for hold in holds:
        pool.grow(hold, 3, hoped=5)
    for _ in range(5):
        for hold in holds:
            pool.grow(hold, 1)
    assert [len(hold.segments(8)) for hold in holds] == [1] * 4
    late = Hold(1)
    pool.grow(late, 32)
    assert len(late.segments(32)) == 1


def test_claims_give_way_where_there_are_no_other_blocks():
    pool = BlockPool(8, 1)
    first, second = Hold(1), Hold(1)
    pool.grow(first, 2, hoped=6)
    pool.grow(second, 4)
    assert sorted(first.blocks + second.blocks) == list(range(6))
    pool.release(first)
    pool.release(second)
    assert pool.available == 8


def test_prompts_get_the_first_stretch_that_is_long_enough_or_the_longest():
    pool = BlockPool(12, 1)
    holds = [Hold(1) for _ in range(12)]
    for hold in holds:
        pool.grow(hold, 1)
    for number in (1, 2, 4, 5, 6, 8, 9, 10, 11):
        pool.release(holds[number])
    short, long = Hold(1), Hold(1)
    pool.grow(short, 3)
    assert short.blocks == [4, 5, 6]
    pool.grow(long, 6)
    assert long.blocks == [8, 9, 10, 11, 1, 2]


@pytest.mark.parametrize("seed", range(30))
def test_no_block_is_lost_or_held_by_two_whatever_happens(seed):
    draw = random.Random(seed)
    pool = BlockPool(draw.randint(4, 40), 1)
    holds = []
    for _ in range(150):
        keys = keys_of(*(draw.randint(1, 2) for _ in range(draw.randint(1, 6))))
        hits = pool.match(keys)
        missing = len(keys) - hits
        if draw.random() < 0.6 and missing <= pool.room_beside(keys[:hits]):
            hold = pool.take(keys[:hits])
            shared = list(hold.blocks)
            before = {number for one, _ in holds for number in one.blocks}
            pool.grow(hold, missing, draw.randint(0, 12))
            assert not before & set(hold.blocks[len(shared) :])
            for number, key in enumerate(keys):
                pool.publish(hold, number, key)
            holds.append((hold, keys))
        elif holds:
            pool.release(holds.pop(draw.randrange(len(holds)))[0])
        held = {number for one, _ in holds for number in one.blocks}
        assert pool.available == pool.count - len(held)
        assert all(pool.match(keys) == len(keys) for _, keys in holds)
        assert not held & (pool._free | pool._left.keys())
        assert pool._claims.keys() <= pool._free
        assert pool._found == {key: number for number, key in pool._keys.items()}
    for hold, _ in holds:
        pool.release(hold)
    assert pool.available == pool.count
    assert not pool._claims
