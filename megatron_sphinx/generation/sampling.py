"""From logits to the next token of each row, and to log-probabilities.

A token follows from its row's logits, its settings, and one random number, which the seed of the answer and the number
of the token make alone: not from the rows beside it, their order, the layout of the ranks, or the device.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sphinx.errors import DivergedError
from megatron_sphinx.generation.requests import TokenLogprob
from megatron_sphinx.generation.ticks import Draw

_LIKELIEST = (128, 2048)  # tokens of a row that are sorted, before all are; nearly always so few are enough
_FINITE = (torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
_ROWS_AT_ONCE = 64  # in double precision, when log-probabilities are computed


def draw(logits: Tensor, draws: Sequence[Draw]) -> list[TokenLogprob]:
    """Draw the next token of each row.

    Args:
        logits: fp32 [rows, vocabulary].
        draws: how each row's token is drawn. The penalty of tokens that were seen comes first, then the temperature,
            the `top_k` likeliest, and of these the ones before which there is no more than `top_p` of their
            probability. Of equal tokens the lower id comes first.

    Returns:
        For each row the token; its log-probability and the likeliest ones are those of the logits as they came in, and
        0.0 and none where they are not asked for.

    Raises:
        DivergedError: the largest logit of a row is not finite.

    Source: MetaModel.sample_top_p of the released accessory/model/meta.py; the penalty is that of CTRL,
        arXiv:1909.05858, section 4.1.
    """
    assert len(logits) == len(draws), "a row has no setting"
    penalised = _penalise(logits, draws)
    tokens = penalised.argmax(1)
    if not penalised.gather(1, tokens[:, None]).isfinite().all():
        raise DivergedError("logits that are not finite: the model computes NaN or infinity; check its weights")
    if sampled := [row for row, one in enumerate(draws) if one.temperature > 0]:
        rows = torch.tensor(sampled, device=logits.device)
        tokens[rows] = _sample(penalised[rows], [draws[row] for row in sampled])
    drawn = [TokenLogprob(token, 0.0) for token in tokens.tolist()]
    if asked := [row for row, one in enumerate(draws) if one.top_logprobs is not None]:
        logprobs = score(logits, asked, [drawn[row].token for row in asked])
        for row, logprob in zip(asked, logprobs, strict=True):
            token = drawn[row].token
            drawn[row] = TokenLogprob(token, logprob, _top(logits[row], draws[row].top_logprobs or 0, token, logprob))
    return drawn


def score(logits: Tensor, rows: Sequence[int], targets: Sequence[int]) -> list[float]:
    """Return log-probabilities of tokens, in nats; the sum over the vocabulary is computed once a row.

    Args:
        logits: fp32 [rows, vocabulary].
        rows: of each target the row that it is behind; several may be behind one.
        targets: ids of tokens.
    """
    places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
    used, device = torch.tensor(list(places), dtype=torch.int64, device=logits.device), logits.device
    sums = [logits[some].double().logsumexp(1) for some in used.split(_ROWS_AT_ONCE)]
    ids, behind = (torch.tensor(one, dtype=torch.int64, device=device) for one in (targets, rows))
    order = torch.tensor([places[row] for row in rows], dtype=torch.int64, device=device)
    scores: list[float] = (logits[behind, ids].double() - torch.cat(sums)[order]).tolist()
    return scores


def uniform(seed: int, number: int) -> float:
    """Return the random number of a token: 53 bits, from 0 to below 1, which `seed` and `number` make alone."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return float((int.from_bytes(digest) >> 11) / 2**53)


def _penalise(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return logits [rows, vocabulary] with those of seen tokens made smaller; themselves, where no row asks for it."""
    penalised = [(row, one) for row, one in enumerate(draws) if one.repetition_penalty != 1 and one.seen]
    if not penalised:
        return logits
    logits = logits.clone()
    for row, one in penalised:
        seen = torch.tensor(one.seen, device=logits.device)
        values = logits[row, seen]
        values = torch.where(values < 0, values * one.repetition_penalty, values / one.repetition_penalty)
        logits[row, seen] = values.clamp(*_FINITE)  # a penalty may be next to nothing
    return logits


def _sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw a token of each row at random, int64 [rows]; logits [rows, vocabulary] with the penalty in them."""
    temperatures = torch.tensor([one.temperature for one in draws], dtype=torch.float64, device=logits.device)
    below = logits.double() - logits.max(1, keepdim=True).values  # which stays finite at the lowest temperature
    probabilities = (below / temperatures[:, None]).softmax(1)
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    rows = torch.arange(len(draws), device=logits.device)
    for count in (*_LIKELIEST, logits.shape[1]):
        found, is_found = _invert(
            probabilities[rows], [draws[row] for row in rows.tolist()], min(count, logits.shape[1])
        )
        tokens[rows[is_found]] = found[is_found]
        rows = rows[~is_found]
        if not len(rows):
            break
    return tokens


def _invert(probabilities: Tensor, draws: Sequence[Draw], count: int) -> tuple[Tensor, Tensor]:
    """Find the token at which the sum of probabilities, the largest first, goes beyond each row's random number.

    Args:
        probabilities: fp64 [rows, vocabulary], each row's sum is 1.
        draws: the settings of each row.
        count: how many of the largest are looked at.

    Returns:
        Tokens, int64 [rows], and whether each is the right one, bool [rows]: that needs no more than those.
    """
    columns = [
        [uniform(one.seed, one.number) for one in draws],
        [one.top_k or probabilities.shape[1] for one in draws],
        [one.top_p for one in draws],
    ]
    numbers, top_k, top_p = torch.tensor(columns, dtype=torch.float64, device=probabilities.device)[:, :, None]
    largest, ids, known = _largest(probabilities, count)
    places = torch.arange(count, device=probabilities.device)
    sums = largest.cumsum(1)
    is_whole = (top_k <= known) | (known == probabilities.shape[1])
    mass = torch.where(is_whole, (largest * (places < top_k)).sum(1, keepdim=True), 1.0)  # of the top k, if known
    limit = torch.where(top_p < 1, top_p * mass, torch.inf)
    is_kept = (sums - largest <= limit) & (places < torch.minimum(top_k, known)) & (largest > 0)
    kept = (largest * is_kept).sum(1, keepdim=True)
    is_closed = is_whole | ((top_k >= probabilities.shape[1]) & (is_kept.sum(1, keepdim=True) < known))
    is_open = (top_k >= probabilities.shape[1]) & (top_p >= 1)  # nothing is left out: the sum is 1
    goal = numbers * torch.where(is_closed, kept, 1.0)
    last = (is_kept.sum(1, keepdim=True) - 1).clamp(min=0)
    index = torch.minimum((sums <= goal).sum(1, keepdim=True), last)
    is_found = is_closed | (is_open & (goal < kept))
    return ids.gather(1, index)[:, 0], is_found[:, 0]


def _largest(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest probabilities of each row, of equal ones the lower id first.

    Returns:
        Probabilities and ids, [rows, count], and how many of them are sure to be the right ones, [rows, 1]: others may
        be equal to the last of them.
    """
    if count == probabilities.shape[1]:
        values, ids = probabilities.sort(dim=1, descending=True, stable=True)
        return values, ids, torch.full_like(ids[:, :1], count)
    ids = probabilities.topk(count, 1).indices.sort(dim=1).values
    values, order = probabilities.gather(1, ids).sort(dim=1, descending=True, stable=True)
    known = (values > values[:, -1:]).sum(1, keepdim=True)
    return values, ids.gather(1, order), known


def _top(logits: Tensor, count: int, token: int, logprob: float) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens of a row and their log-probabilities, of equal ones the lower id first.

    Args:
        logits: fp32 [vocabulary].
        count: how many.
        token: one whose log-probability is known.
        logprob: what it is.
    """
    if not count:
        return ()
    values = logits.double()
    least = values.topk(min(count, len(values))).values[-1]
    ids = (values >= least).nonzero()[:, 0]
    best, order = values[ids].sort(dim=0, descending=True, stable=True)
    logprobs = best - values[token] + logprob
    return tuple(zip(ids[order].tolist()[:count], logprobs.tolist()[:count], strict=True))
