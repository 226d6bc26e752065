"""A sequence on its way through the engine: its tokens, how many of them are in the cache, and where."""

from megatron_sphinx.generation.blocks import Hold, chained_key
from megatron_sphinx.generation.delivery import Delivery
from megatron_sphinx.generation.requests import Prompt, Sampling
from megatron_sphinx.generation.ticks import Draw, Piece


class CachedSequence:
    """A prompt and what follows it: the answer as far as it is drawn, or a continuation that is scored.

    Args:
        prompt: what it begins with.
        delivery: takes what its pieces give.
        sampling: how the answer is drawn; None where a continuation is scored.
        continuation: ids of the tokens to score.
        choices: ids of the tokens that are scored behind the continuation, each as if it alone came next.
        block: tokens of a block of the cache.
        is_shared: whether its blocks can be found by other sequences, and theirs by it.

    Attributes:
        prompt: what it begins with.
        delivery: takes what its pieces give.
        picture_end: number of the first token behind the picture; 0 without a picture.
        number: counted in the order in which requests came; -1 before it has one.
        replica: the replica that computes it.
        hold: its blocks; None while it waits.
        computed: how many of its tokens are in the cache.
        is_under_way: whether a tick computes a piece of it.
        is_ended: whether whoever asked has heard the last of it.
        cached_tokens: how many tokens of the prompt were in the prefix cache; None before that is known.
        is_encoded_for: whether its picture was encoded because of it.
    """

    def __init__(
        self,
        prompt: Prompt,
        delivery: Delivery,
        *,
        block: int,
        sampling: Sampling | None = None,
        continuation: tuple[int, ...] = (),
        choices: tuple[int, ...] = (),
        is_shared: bool = True,
    ) -> None:
        self.prompt, self.delivery, self._sampling = prompt, delivery, sampling
        self._continuation, self._choices = continuation, choices
        self.number, self.replica = -1, 0
        self.hold: Hold | None = None
        self.computed = 0
        self.is_under_way = self.is_ended = self.is_encoded_for = False
        self.cached_tokens: int | None = None
        self.picture_end = 1 + prompt.picture.positions if prompt.picture else 0
        self._tokens = [*prompt.tokens, *(continuation if choices else continuation[:-1])]
        self._block, self._keys, self._is_shared = block, list[bytes](), is_shared
        self._seen = self._penalised()

    def _penalised(self) -> dict[int, None] | None:
        """Return the ids in the prompt's text, each once; None where no penalty is for them."""
        if self._sampling is None or self._sampling.repetition_penalty == 1:
            return None
        behind = self.picture_end
        text = self.prompt.tokens if not behind else (*self.prompt.tokens[:1], *self.prompt.tokens[behind:])
        return dict.fromkeys(text)

    @property
    def length(self) -> int:
        """How many tokens are known."""
        return len(self._tokens)

    @property
    def rest(self) -> int:
        """How many of the tokens that are known are not in the cache."""
        return len(self._tokens) - self.computed

    @property
    def drawn(self) -> int:
        """How many tokens of the answer are drawn."""
        return len(self._tokens) - len(self.prompt.tokens) if self._sampling else 0

    @property
    def undrawn(self) -> int:
        """How many tokens of the answer may still be drawn."""
        return self._sampling.max_new_tokens - self.drawn if self._sampling else 0

    def keys(self, tokens: int) -> list[bytes]:
        """Return the keys of the full blocks of its first tokens; none where it shares none."""
        while self._is_shared and len(self._keys) < tokens // self._block:
            begin = len(self._keys) * self._block
            before = self._keys[-1] if self._keys else b""
            picture = self.prompt.picture if begin < self.picture_end else None
            tokens_here = self._tokens[begin : begin + self._block]
            self._keys.append(chained_key(before, tokens_here, picture.key if picture else ""))
        return self._keys[: tokens // self._block]

    @property
    def findable(self) -> list[bytes]:
        """Keys of the blocks that need not be computed where the cache has them; what follows is computed always."""
        return self.keys((self.length if self._sampling else len(self.prompt.tokens)) - 1)

    def add(self, token: int) -> None:
        """Go on with a token that was drawn."""
        self._tokens.append(token)
        if self._seen is not None:
            self._seen[token] = None

    def next_piece(self, count: int) -> Piece:
        """Return its next tokens as a piece, which is under way from now on; it holds the blocks for them."""
        assert self.hold is not None, "a waiting sequence"
        start, end = self.computed, self.computed + count
        self.is_under_way = True
        return Piece(
            tokens=tuple(self._tokens[start:end]),
            start=start,
            segments=self.hold.segments(end),
            picture=self.prompt.picture.key if self.prompt.picture and start < self.picture_end and end > 1 else None,
            draw=self._draw(self._sampling) if self._sampling and end == self.length else None,
            targets=self._targets(start, end) if self._sampling is None else (),
            mark=self.prompt.mark,
        )

    def _draw(self, asked: Sampling) -> Draw:
        """Return how the next token is drawn."""
        return Draw(
            seed=asked.seed,
            number=self.drawn,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            repetition_penalty=asked.repetition_penalty,
            seen=tuple(self._seen) if self._seen else (),
            top_logprobs=asked.top_logprobs,
        )

    def _targets(self, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """Return which tokens of continuation and choices are scored behind which of the tokens from start to end."""
        first = len(self.prompt.tokens) - 1  # token behind which the continuation begins
        last = first + len(self._continuation)  # behind which the choices stand
        targets = [(number - start, self._continuation[number - first])
                   for number in range(max(start, first), min(end, last))]  # fmt: skip
        if start <= last < end:
            targets += [(last - start, choice) for choice in self._choices]
        return tuple(targets)
