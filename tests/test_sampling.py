"""The next token: drawn with the right probabilities, and the same one whatever is drawn beside it."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from megatron_sphinx.errors import DivergedError
from megatron_sphinx.generation import sampling
from megatron_sphinx.generation.requests import TokenLogprob
from megatron_sphinx.generation.sampling import draw, score, uniform
from megatron_sphinx.generation.ticks import Draw


def probabilities_of(logits: torch.Tensor, setting: Draw) -> np.ndarray:
    """What each token's probability is: transformers' processors, and the released code's rule for top_p."""
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

    scores = logits[None].clone()
    if setting.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(setting.repetition_penalty)(torch.tensor([setting.seen]), scores)
    scores = TemperatureLogitsWarper(setting.temperature)(None, scores)
    if setting.top_k:
        scores = TopKLogitsWarper(setting.top_k)(None, scores)
    probabilities = scores[0].double().softmax(0).numpy()
    kept, before = np.zeros(len(logits)), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if before > setting.top_p:
            break
        kept[token] = probabilities[token]
        before += probabilities[token]
    return kept / kept.sum()


SETTINGS = [
    Draw(0, 0, temperature=1.0),
    Draw(0, 0, temperature=0.7, top_k=5),
    Draw(0, 0, temperature=1.3, top_p=0.75),
    Draw(0, 0, temperature=1.0, top_p=0.0),
    Draw(0, 0, temperature=1.0, top_k=1),
    Draw(0, 0, temperature=0.9, top_k=12, top_p=0.6),
    Draw(0, 0, temperature=2.0, top_k=9, repetition_penalty=1.4, seen=(0, 3, 7, 11)),
    Draw(0, 0, temperature=1.0, top_p=0.9, repetition_penalty=0.8, seen=(1, 2)),
]


@pytest.mark.parametrize("likeliest", [(24,), (3, 7)])
@pytest.mark.parametrize("setting", SETTINGS, ids=range(len(SETTINGS)))
def test_tokens_come_as_often_as_they_should(monkeypatch, setting, likeliest):
    monkeypatch.setattr(sampling, "_LIKELIEST", likeliest)  # 3, 7: rows that need more than are sorted at first
    count, logits = 8000, torch.randn(24, generator=torch.Generator().manual_seed(5)) * 2
    wanted = probabilities_of(logits, setting) * count
    drawn = draw(logits.expand(count, -1), [replace(setting, seed=3, number=number) for number in range(count)])
    found = np.bincount([one.token for one in drawn], minlength=24)
    assert not found[wanted == 0].any()
    often = wanted >= 5
    rest = [[values[~often].sum()] if wanted[~often].sum() > 0 else [] for values in (found, wanted)]
    if len(columns := np.concatenate([wanted[often], rest[1]])) > 1:
        assert chisquare(np.concatenate([found[often], rest[0]]), columns).pvalue > 1e-4


def random_draw(rng: random.Random, vocabulary: int) -> Draw:
    return Draw(
        seed=rng.randrange(2**63),
        number=rng.randrange(5000),
        temperature=rng.choice([0.0, 0.1, 1.0, 5.0]),
        top_k=rng.choice([0, 1, 40, vocabulary, 2**31]),
        top_p=rng.choice([0.0, 0.5, 0.95, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        seen=tuple(rng.sample(range(vocabulary), 5)),
        top_logprobs=rng.choice([None, 0, 3]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_token_does_not_depend_on_the_rows_beside_it(seed):
    rng = random.Random(seed)
    vocabulary = rng.choice([3, 50, 3000])
    draws = (
        [random_draw(rng, vocabulary) for _ in range(60)] if vocabulary > 5 else [Draw(1, n, 1.0) for n in range(60)]
    )
    logits = torch.randn(len(draws), vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    together, order = draw(logits, draws), rng.sample(range(len(draws)), len(draws))
    assert draw(logits[order], [draws[row] for row in order]) == [together[row] for row in order]
    assert [draw(logits[row : row + 1], [draws[row]])[0] for row in range(len(draws))] == together


def test_the_short_way_finds_what_the_long_one_finds(monkeypatch):
    rng = random.Random(1)
    draws = [replace(random_draw(rng, 500), top_logprobs=None) for _ in range(300)]
    logits = (torch.randn(300, 500, generator=torch.Generator().manual_seed(1)) * 4).round()  # with equal ones
    found = []
    for likeliest in ((), (30, 200)):
        monkeypatch.setattr(sampling, "_LIKELIEST", likeliest)
        found.append(draw(logits, draws))
    assert found[0] == found[1]


def test_of_equal_tokens_the_lowest_id_is_taken():
    logits = torch.zeros(4, 3000)
    logits[:, [70, 2000, 2999]] = 1.0
    greedy = draw(logits, [Draw(0, 0), Draw(0, 0, 1.0, 1), Draw(0, 0, 1.0, 0, 0.0), Draw(0, 0, top_logprobs=4)])
    assert [one.token for one in greedy] == [70] * 4
    assert [token for token, _ in greedy[3].top] == [70, 2000, 2999, 0]
    seen = draw(logits, [Draw(0, 0, repetition_penalty=1.1, seen=(70,))] * 4)
    assert [one.token for one in seen] == [2000] * 4
    assert (logits[:, 70] == 1).all()  # they are not changed


def test_equal_tokens_are_all_drawn():
    drawn = draw(torch.zeros(400, 5000), [Draw(seed, 1, 1.0) for seed in range(400)])
    assert kstest([one.token / 5000 for one in drawn], "uniform").pvalue > 1e-3


def test_log_probabilities_are_those_of_the_model():
    logits = torch.randn(70, 400, generator=torch.Generator().manual_seed(2)) * 5
    wanted = logits.log_softmax(1)
    targets = torch.randint(0, 400, (70,), generator=torch.Generator().manual_seed(3)).tolist()
    assert score(logits, range(70), targets) == pytest.approx(
        [wanted[row, token].item() for row, token in enumerate(targets)], abs=2e-6
    )
    rows = [69, *[3] * 68, 69]  # many behind one row, in any order
    assert score(logits, rows, targets) == pytest.approx(
        [wanted[row, token].item() for row, token in zip(rows, targets, strict=True)], abs=2e-6
    )
    draws = [
        Draw(row, 0, 2.0, top_k=9, top_p=0.5, repetition_penalty=2.0, seen=(1,), top_logprobs=5) for row in range(70)
    ]
    for row, one in enumerate(draw(logits, draws)):
        assert one.logprob == pytest.approx(wanted[row, one.token].item(), abs=2e-6)
        best = wanted[row].topk(5)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=2e-6)
    assert draw(logits[:1], [Draw(0, 0, top_logprobs=0)])[0].top == ()
    assert draw(logits[:1], [Draw(0, 0)]) == [TokenLogprob(logits[0].argmax().item(), 0.0)]
    assert score(logits[:0], [], []) == []


def test_padding_of_the_vocabulary_is_never_drawn_and_nan_is_an_error():
    logits = torch.zeros(200, 12)
    logits[:, 10:] = -torch.inf
    draws = [Draw(seed, 0, 50.0) for seed in range(200)]
    assert {one.token for one in draw(logits, draws)} == set(range(10))
    extremes = [Draw(seed, 0, 1e-300, repetition_penalty=1e-300, seen=(4,)) for seed in range(200)]
    assert {one.token for one in draw(logits + torch.arange(1, 13), extremes)} == {4}
    for bad in (Draw(0, 0), Draw(0, 0, 1.0)):
        logits[1, 3] = torch.nan
        with pytest.raises(
            DivergedError, match="logits that are not finite: the model computes NaN or infinity; check"
        ):
            draw(logits[:2], [Draw(0, 0), bad])


def test_random_numbers_are_uniform_and_follow_from_seed_and_number():
    numbers = [uniform(seed, number) for seed in range(60) for number in range(60)]
    assert len(set(numbers)) == 3600
    assert kstest(numbers, "uniform").pvalue > 1e-3
    assert uniform(1, 11) != uniform(11, 1) != uniform(1, 1)
    assert uniform(7, 2) == 0.40594927271533565  # what was drawn once is drawn for ever


def test_32_greedy_rows_cost_about_as_much_as_their_maximum():
    logits = torch.randn(32, 32000)
    draws = [Draw(row, 5) for row in range(32)]

    def seconds(compute) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            compute()
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(lambda: draw(logits, draws)) < 3 * seconds(lambda: logits.argmax(1)) + 1e-3
