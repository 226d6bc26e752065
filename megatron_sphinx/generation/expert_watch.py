"""A rank's MoE experts while they answer: which of them compute, and what their routers chose."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from megatron_sphinx.generation.expert_orders import Choices, Collect, ExpertOrder, Restrict, WatchedExperts
from megatron_sphinx.generation.ticks import Piece
from megatron_sphinx.model.experts import RowMoE, restrict_experts


class ExpertWatch:
    """Obeys orders about the experts of a rank's layers; records nothing before it is ordered to.

    Args:
        language: the rank's part of the decoder.
    """

    def __init__(self, language: nn.Module) -> None:
        self._language = language
        self._layers = [layer for layer in language.modules() if isinstance(layer, RowMoE)]
        self._is_watching, self._subsets = False, list[tuple[int, ...]]()
        self._known: dict[int, int] = {}  # how many tokens of each prompt have been recorded
        self._marks: list[tuple[int, int]] = []  # of the tick: marks, and how many tokens of each are recorded
        self._rows: Tensor | None = None  # the tokens of the tick that are recorded
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._record: dict[int, list[Choices]] = {}
        self._errors: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}

    def obey(self, order: ExpertOrder) -> WatchedExperts | None:
        """Do what is ordered; return what has been recorded where that is asked for."""
        if isinstance(order, Restrict):
            restrict_experts(self._language, order.choice)
            return None
        if isinstance(order, Collect):
            return self._collected()
        self._is_watching = True
        for layer in self._layers:
            layer.observer = self._see
            experts = range(layer.router.num_experts)
            self._subsets = [subset for size in order.keep for subset in combinations(experts, size)]
        return None

    def begin(self, pieces: Sequence[Piece]) -> None:
        """Note whose tokens the layers compute next; those that are computed again are not recorded again."""
        if not self._is_watching:
            return
        rows, begin = list[int](), 0
        self._marks = []
        for piece in pieces:
            end = begin + len(piece.tokens)
            if piece.mark is not None:
                first = begin + max(0, self._known.get(piece.mark, 0) - piece.start)
                rows += range(first, end)
                if first < end:
                    self._marks.append((piece.mark, end - first))
                    self._known[piece.mark] = piece.start + len(piece.tokens)
            begin = end
        self._rows = torch.tensor(rows) if rows else None

    def _see(self, layer: RowMoE, hidden: Tensor) -> None:
        """Look at what comes into a layer, [tokens, 1, hidden]."""
        if self._rows is None:
            return
        tokens = hidden[:, 0].index_select(0, self._rows.to(hidden.device))
        logits = layer.router.gating(tokens)
        experts, shares = layer.router.choose(logits)
        self._seen[layer.layer_number - 1] = (experts.to(torch.int16).cpu(), shares[:, 0].cpu())
        if self._subsets:
            self._sum_errors(layer, tokens, logits)

    def _sum_errors(self, layer: RowMoE, tokens: Tensor, logits: Tensor) -> None:
        """Add what each subset of experts, kept alone, makes of a layer's output of some tokens.

        The output is a sum of the experts' outputs by weights, so the products of those outputs among each other give
        the error of every subset.

        Args:
            layer: the layer, whose experts are all on this rank.
            tokens: [tokens, hidden].
            logits: of its router, [tokens, experts].

        Source: arXiv:2402.14800, section 3.2.
        """
        count = layer.router.num_experts
        counts = torch.full((count,), len(tokens))
        ones = torch.ones(count * len(tokens), device=tokens.device)
        out = layer.experts(tokens.repeat(count, 1), counts, ones)[0].view(count, len(tokens), -1).double()
        products = torch.einsum("eth,fth->tef", out, out)
        whole = self._weights(layer, logits, range(count))
        errors = []
        for subset in self._subsets:
            change = self._weights(layer, logits, subset) - whole
            errors.append(torch.einsum("te,tef,tf->", change, products, change))
        number = layer.layer_number - 1
        self._errors[number] = self._errors.get(number, 0) + torch.stack(errors).cpu()
        self._norms[number] = self._norms.get(number, 0) + torch.einsum("te,tef,tf->", whole, products, whole).cpu()

    @staticmethod
    def _weights(layer: RowMoE, logits: Tensor, kept: Sequence[int]) -> Tensor:
        """Return the weights of all experts where only some may be chosen: fp64 [tokens, experts]."""
        places = torch.tensor(list(kept), device=logits.device)
        largest, chosen = logits[:, places].topk(min(layer.router.experts_per_token, len(kept)), 1)
        return torch.zeros_like(logits).scatter(1, places[chosen], largest.softmax(-1)).double()

    def end(self) -> None:
        """Record what the layers have chosen for the tokens of this tick."""
        if self._rows is None or not self._seen:
            return
        experts, weights = (torch.stack([self._seen[number][part] for number in sorted(self._seen)]) for part in (0, 1))
        lengths = [count for _, count in self._marks]
        parts = zip(experts.split(lengths, 1), weights.split(lengths, 1), strict=True)
        for (mark, _), (chosen, weight) in zip(self._marks, parts, strict=True):
            self._record.setdefault(mark, []).append(Choices(chosen.numpy(), weight.numpy()))
        self._seen = {}

    def _collected(self) -> WatchedExperts:
        """Return what has been recorded, and begin anew."""
        prompts = {mark: Choices.joined(parts, 1) for mark, parts in self._record.items()}
        errors = {layer: dict(zip(self._subsets, error.tolist(), strict=True)) for layer, error in self._errors.items()}
        norms = {layer: float(norm) for layer, norm in self._norms.items()}
        self._record, self._errors, self._norms, self._known = {}, {}, {}, {}
        return WatchedExperts(tuple(layer.layer_number - 1 for layer in self._layers), prompts, errors, norms)
