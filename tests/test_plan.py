"""The plan of a step: exact, the same for every layout, nothing lost; on random settings, their seed in the name."""

import random
from collections import Counter

import numpy as np
import pytest

from megatron_sphinx.data.plan import DataConfig, Planner

SEEDS = range(12)


def planner_of(seed: int, replicas: int = 1, rows: int | None = None) -> Planner:
    """A planner over random sources; `replicas` and `rows` are all that may differ between two of one seed."""
    rng = random.Random(seed)
    captions = np.array([rng.randint(0, 30) for _ in range(rng.randint(5, 60))], np.int32)
    texts = np.array([rng.randint(2, 300) for _ in range(rng.randint(3, 40))], np.int32)
    config = DataConfig(
        pairs="x",
        text="x",
        tokenizer="x",
        pairs_per_step=rng.randint(1, 25),
        text_tokens_per_step=rng.randint(1, 900),
        sequence_length=rng.randint(20, 120),
        micro_batch_rows=rows or rng.randint(1, 5),
        isolate_documents=rng.random() < 0.7,
    )
    return Planner(
        config,
        caption_lengths=captions,
        text_lengths=texts,
        tokens_of_views=lambda pair: (9, 1),
        cost=lambda lengths: sum(100 * n + n * n for n in lengths),
        replicas=replicas,
        seed=seed,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_every_step_has_exactly_its_share_of_both_streams(seed):
    planner = planner_of(seed)
    for step in range(5):
        plan = planner.step(step)
        assert len(plan.pairs) == planner.config.pairs_per_step
        assert sum(tokens for _, _, tokens in plan.text) == planner.config.text_tokens_per_step
        assert all(sum(piece.length for piece in row) <= planner.config.sequence_length for row in plan.rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_epoch_has_every_pair_and_every_token_once(seed):
    planner = planner_of(seed)
    pairs, steps = len(planner._caption_lengths), 60
    taken = [piece for step in range(steps) for piece in planner._plan_pairs(step)[0]]
    for epoch in range(len(taken) // pairs):
        items = [piece.item for piece in taken[epoch * pairs : (epoch + 1) * pairs]]
        assert sorted(items) == list(range(pairs))
    total = planner._text.tokens
    tokens = Counter()
    targets = 0
    for piece in planner._text.pieces(total, total):  # the second epoch
        tokens.update((piece.item, n) for n in range(piece.start, piece.start + piece.tokens))
        targets += piece.targets
    assert len(tokens) == total
    assert set(tokens.values()) == {1}
    assert targets == total - len(planner._text.lengths)  # all but each document's first token are predicted


@pytest.mark.parametrize("seed", SEEDS)
def test_a_piece_that_is_cut_predicts_the_token_behind_the_cut(seed):
    planner = planner_of(seed)
    for row in planner.step(1).rows:
        for piece in row:
            if not piece.is_pair:
                ends = piece.start + piece.tokens == planner._text.lengths[piece.item]
                assert piece.targets == piece.tokens - ends
            else:
                assert piece.targets == piece.tokens + 1


@pytest.mark.parametrize("seed", SEEDS)
def test_replicas_and_micro_batches_change_no_sample_and_no_row(seed):
    rng = random.Random(seed)
    reference = planner_of(seed)
    other = planner_of(seed, replicas=rng.randint(2, 9), rows=rng.randint(1, 7))
    for step in (0, 3, 17):
        a, b = reference.step(step), other.step(step)
        assert a.rows == b.rows
        assert a.digest == b.digest
        dealt = [row for replicas in b.micro_batches for rows in replicas for row in rows]
        assert sorted(map(repr, dealt)) == sorted(map(repr, b.rows))
        assert all(len(rows) <= other.config.micro_batch_rows for replicas in b.micro_batches for rows in replicas)
        assert {len(replicas) for replicas in b.micro_batches} == {other.replicas}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_does_not_depend_on_the_steps_before_it(seed):
    one, other = planner_of(seed), planner_of(seed)
    assert [one.step(step).digest for step in range(8)][7] == other.step(7).digest
    assert planner_of(seed + 100).step(7).digest != other.step(7).digest


def test_replicas_are_balanced_by_cost():
    rng = np.random.default_rng(0)
    planner = Planner(
        DataConfig(pairs=None, text="x", tokenizer="x", pairs_per_step=0, text_tokens_per_step=64000,
                   sequence_length=1000, micro_batch_rows=4),
        caption_lengths=None,
        text_lengths=rng.integers(10, 3000, 500).astype(np.int32),
        tokens_of_views=lambda pair: (9, 1),
        cost=lambda lengths: sum(100 * n + n * n for n in lengths),
        replicas=4,
        seed=0,
    )  # fmt: skip
    for replicas in planner.step(3).micro_batches:
        costs = [sum(planner._cost(planner.lengths(row)) for row in rows) for rows in replicas]
        assert max(costs) < 1.2 * sum(costs) / len(costs)


def test_rows_of_pairs_are_nearly_full():
    planner = Planner(
        DataConfig(pairs="x", tokenizer="x", pairs_per_step=640, text_tokens_per_step=0, sequence_length=2048),
        caption_lengths=np.random.default_rng(0).integers(5, 60, 5000).astype(np.int32),
        text_lengths=None,
        tokens_of_views=lambda pair: (291, 1),
        cost=sum,
        replicas=1,
        seed=0,
    )
    rows = planner.step(0).rows
    filled = [sum(piece.length for piece in row) for row in rows]
    assert len(rows) <= -(-sum(filled) // 2048) * 1.1


def test_a_caption_longer_than_a_row_is_cut_and_counted():
    planner = Planner(
        DataConfig(pairs="x", tokenizer="x", pairs_per_step=2, text_tokens_per_step=0, sequence_length=20),
        caption_lengths=np.array([9, 10], np.int32),
        text_lengths=None,
        tokens_of_views=lambda pair: (9, 1),
        cost=sum,
        replicas=1,
        seed=0,
    )
    plan = planner.step(0)
    assert plan.captions_cut == 1
    assert {piece.tokens for row in plan.rows for piece in row} == {9}
