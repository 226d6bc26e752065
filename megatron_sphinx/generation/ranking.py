"""The likeliest of many texts, found by a best-first search in the tree of their tokens, without scoring most of them.

What a text begins with is at least as likely as the whole, so nothing behind a beginning need be looked at while other
texts are likelier as a whole. Of 1,000 class names a few beginnings are left in nearly every search.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from math import isnan

from megatron_sphinx.errors import DataError, DivergedError


@dataclass(frozen=True, order=True)
class Branch:
    """A beginning that some texts have in common.

    Attributes:
        first: the first of those texts, in the order of the tree.
        end: the text behind the last of them.
        known: how many of its tokens have been scored when it is chosen; the rest up to where texts part, or one ends,
            is scored with what comes next.
    """

    first: int
    end: int
    known: int


class TokenTree:
    """Texts as a tree of tokens.

    Args:
        texts: ids of the tokens of each, with that of its end: no text may be the beginning of another one.

    Raises:
        DataError: a text is empty, or the beginning of another one.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._numbers = sorted(range(len(texts)), key=lambda number: tuple(texts[number]))
        self._texts = [tuple(texts[number]) for number in self._numbers]
        if not texts or not self._texts[0]:
            raise DataError("choices: a text without tokens, or none at all; give texts of one token or more")
        for place, (one, other) in enumerate(pairwise(self._texts)):
            if other[: len(one)] == one:
                names = f"choices {self._numbers[place]} and {self._numbers[place + 1]}"
                raise DataError(f"{names}: the tokens of one begin the other's; give texts that end differently")

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def root(self) -> Branch:
        """The branch of all texts."""
        return Branch(0, len(self._texts), 0)

    def number(self, branch: Branch) -> int:
        """Return the number of the text of a branch that has only one."""
        return self._numbers[branch.first]

    def is_complete(self, branch: Branch) -> bool:
        """Say whether a branch is one text, all tokens of which have been scored."""
        return branch.end - branch.first == 1 and branch.known == len(self._texts[branch.first])

    def tokens(self, branch: Branch) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of a branch: those that have been scored, and the rest up to where its texts part."""
        first, last = self._texts[branch.first], self._texts[branch.end - 1]
        shared = next(
            (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
        )
        return first[: branch.known], first[branch.known : shared]

    def parts(self, branch: Branch) -> Iterator[tuple[int, Branch]]:
        """Yield the token that each part of a branch goes on with, and the part; none where it is one text."""
        if branch.end - branch.first == 1:
            return
        shared = sum(map(len, self.tokens(branch)))
        begin = branch.first
        for place in range(branch.first + 1, branch.end + 1):
            token = self._texts[begin][shared]
            if place == branch.end or self._texts[place][shared] != token:
                yield token, Branch(begin, place, shared + 1)
                begin = place


@dataclass(frozen=True)
class Step:
    """What a search has to know next.

    Attributes:
        prefix: ids that follow the prompt, whose log-probabilities are known.
        continuation: ids behind these, of which each log-probability is asked for.
        choices: ids of which each may come next behind the continuation: their log-probabilities are asked for, too.
    """

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]
    choices: tuple[int, ...]


class Search:
    """The search for the likeliest texts behind one prompt: exact, and of equal ones the one that was given first.

    A text's log-probability is the sum over its tokens. A beginning is looked into while it is as likely as the text
    that would be found otherwise.

    Args:
        tree: of the texts.
        most: how many are looked for.

    Attributes:
        found: numbers of texts and their log-probabilities in nats, the likeliest first.
        steps: how many steps have been asked for.
    """

    def __init__(self, tree: TokenTree, most: int) -> None:
        self._tree, self._most = tree, min(most, len(tree))
        # a heap: the likeliest first, and beginnings before texts that are as likely
        self._open: list[tuple[float, bool, int, Branch]] = []
        self._asked = tree.root
        self._bound = 0.0
        self.found: list[tuple[int, float]] = []
        self.steps = 0
        self._push(tree.root, 0.0)

    def next_step(self) -> Step | None:
        """Return what has to be scored next; None where all are found."""
        while len(self.found) < self._most:
            cost, is_complete, number, branch = heappop(self._open)
            if not is_complete:
                self._asked, self._bound = branch, -cost
                self.steps += 1
                prefix, rest = self._tree.tokens(branch)
                return Step(prefix, rest, tuple(token for token, _ in self._tree.parts(branch)))
            self.found.append((number, -cost))
        return None

    def take(self, logprobs: Sequence[float]) -> None:
        """Take what the last step asked for: log-probabilities of its continuation, then of its choices.

        Raises:
            DivergedError: one of them is not a number.
        """
        if any(map(isnan, logprobs)):
            raise DivergedError("log-probabilities that are no numbers: the model computes NaN; check its weights")
        _, rest = self._tree.tokens(self._asked)
        bound = self._bound + sum(logprobs[: len(rest)])
        parts = [part for _, part in self._tree.parts(self._asked)]
        if not parts:
            whole = Branch(self._asked.first, self._asked.end, self._asked.known + len(rest))
            self._push(whole, bound)
        for part, logprob in zip(parts, logprobs[len(rest) :], strict=True):
            self._push(part, bound + logprob)

    def _push(self, branch: Branch, bound: float) -> None:
        """Keep a branch for later."""
        is_complete = self._tree.is_complete(branch)
        number = self._tree.number(branch) if is_complete else branch.first
        heappush(self._open, (-bound, is_complete, number, branch))
