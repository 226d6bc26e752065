"""What one replica computes next: which waiting requests begin, which sequences go on, which one gives way."""

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from operator import attrgetter

from megatron_sphinx.generation.blocks import BlockPool
from megatron_sphinx.generation.embeddings import EmbeddingCache
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.requests import Picture
from megatron_sphinx.generation.sequence import CachedSequence
from megatron_sphinx.generation.ticks import Executor, Piece

_AGE = attrgetter("number")


class Replica:
    """The requests of a replica, its blocks and its pictures.

    Requests begin in the order in which they came, except that later ones pass one whose picture is not ready, or
    whose next block another sequence is computing right now: it begins when it can take them. A sequence is given
    blocks for what is known of it; when its answer needs more and there are none, the youngest sequence gives its
    blocks back and begins again later. The oldest one always goes on, so every request ends.

    Args:
        executor: says how large the cache is, and how many ticks are under way.
        limits: of what it takes on.
        counts: what has been done so far, by the names of fields of Load.

    Attributes:
        pool: its blocks.
        embeddings: its pictures.
        waiting: sequences that hold no blocks, the oldest first.
        running: sequences that hold blocks, the oldest first.
        promised: how many unfinished requests will have each block in their prompts.
    """

    def __init__(self, executor: Executor, limits: Limits, counts: Counter[str]) -> None:
        self._limits, self._stages, self._counts = limits, executor.stages, counts
        self._executor = executor
        self.forget_prefixes()
        self.embeddings = EmbeddingCache(limits.picture_positions, limits.encodings)
        self.waiting: list[CachedSequence] = []
        self.running: list[CachedSequence] = []
        self.promised = Counter[bytes]()
        self._making: dict[bytes, CachedSequence] = {}  # blocks, and who computes them
        self._seers: set[CachedSequence] = set()  # use the embeddings of their pictures

    def forget_prefixes(self) -> None:
        """Begin with empty blocks; no sequence may hold any."""
        self.pool = BlockPool(self._executor.places, self._executor.block)

    @property
    def load(self) -> int:
        """How many tokens its requests have still to compute, at most."""
        return sum(sequence.rest + sequence.undrawn for sequence in (*self.waiting, *self.running))

    def foreseen(self, sequence: CachedSequence) -> int:
        """Return how many positions would be computed or encoded for a new request, where it came to this replica."""
        keys = sequence.findable
        hit = next(
            (n for n, key in enumerate(keys) if not self.promised[key] and not self.pool.match([key])), len(keys)
        )
        hit *= self.pool.block
        picture = sequence.prompt.picture
        is_encoded = picture is None or hit >= sequence.picture_end or picture.key in self.embeddings
        return sequence.length - hit + (0 if is_encoded or picture is None else picture.positions)

    def add(self, sequence: CachedSequence) -> None:
        """Take a new request."""
        self.promised.update(sequence.findable)
        self.waiting.append(sequence)

    def remove(self, sequence: CachedSequence) -> None:
        """Let go of a request that has ended; one that is under way when it has come back."""
        if sequence.hold is None:
            self.waiting.remove(sequence)
        elif sequence.is_under_way:
            return
        else:
            self._let_go(sequence)
        for key in sequence.keys(len(sequence.prompt.tokens) - 1):
            self.promised[key] -= 1
            if not self.promised[key]:
                del self.promised[key]

    def pictures_to_encode(self) -> Iterator[Picture]:
        """Yield the pictures of waiting requests whose encoding begins now."""
        wanted = set[str]()
        for sequence in islice(self.waiting, self._limits.sequences):
            picture = sequence.prompt.picture
            if picture is None or self._hit(sequence) >= sequence.picture_end or picture.key in wanted:
                continue
            wanted.add(picture.key)
            if picture.key in self.embeddings:
                self.embeddings.touch(picture.key)
            elif self.embeddings.begin(picture, wanted):
                sequence.is_encoded_for = True
                self._counts["pictures"] += 1
                yield picture
            else:
                break

    def _hit(self, sequence: CachedSequence) -> int:
        """Return how many tokens of a waiting sequence the cache has."""
        return self.pool.match(sequence.findable) * self.pool.block

    def plan(self) -> list[tuple[CachedSequence, Piece]]:
        """Return what the next tick computes: first the next token of each answer, then prompts, the oldest first."""
        budget, planned = self._limits.new_tokens, []
        answering = [sequence for sequence in self.running if not sequence.is_ended and sequence.rest == 1]
        turn = -(-len(answering) // self._stages)  # so that every stage has its share of them
        for sequence in [sequence for sequence in answering if not sequence.is_under_way][:turn]:
            if budget and sequence.hold is not None and self._has_place(sequence):
                planned.append((sequence, sequence.next_piece(1)))
                budget -= 1
        prompts = self._prompts()
        while budget and (prompt := next(prompts, None)):
            count = min(prompt.rest, budget)
            planned.append((prompt, prompt.next_piece(count)))
            budget -= count
        return planned

    def _prompts(self) -> Iterator[CachedSequence]:
        """Yield the sequences that have more than one token to compute, then those that begin now."""
        yield from [sequence for sequence in self.running if sequence.rest > 1 and self._is_idle(sequence)]
        for sequence in list(islice(self.waiting, self._limits.sequences)):
            if len(self.running) >= self._limits.sequences:
                return
            if self._is_held_back(sequence):
                continue
            if not self._has_room(sequence):
                return
            self._begin(sequence)
            yield sequence

    @staticmethod
    def _is_idle(sequence: CachedSequence) -> bool:
        """Whether a running sequence can be computed, or give way."""
        return not sequence.is_under_way and not sequence.is_ended

    def _has_place(self, sequence: CachedSequence) -> bool:
        """Whether there is a place for the next token of a sequence, younger ones having given way where they must."""
        assert sequence.hold is not None, "a waiting sequence"
        missing = self.pool.blocks_of(sequence.computed + 1) - len(sequence.hold.blocks)
        while missing > self.pool.available:
            younger = [one for one in self.running if one.number > sequence.number and self._is_idle(one)]
            if not younger:
                return False
            self._let_go(younger[-1])
            insort(self.waiting, younger[-1], key=_AGE)
        if missing:
            self.pool.grow(sequence.hold, missing)
        return True

    def _is_held_back(self, sequence: CachedSequence) -> bool:
        """Whether a waiting sequence would compute what is being computed or encoded right now."""
        keys = sequence.findable
        hits = self.pool.match(keys)
        if hits < len(keys) and keys[hits] in self._making:
            return True
        picture = sequence.prompt.picture
        needs_picture = picture is not None and hits * self.pool.block < sequence.picture_end
        return needs_picture and not self.embeddings.is_ready(picture.key if picture else "")

    def _has_room(self, sequence: CachedSequence) -> bool:
        """Whether there are blocks for a waiting sequence, and one more for each answer that may need it."""
        keys = sequence.findable[: self.pool.match(sequence.findable)]
        missing = self.pool.blocks_of(sequence.length) - len(keys)
        if self.running:
            missing += sum(self._may_grow(one) for one in (*self.running, sequence))
        return missing <= self.pool.room_beside(keys)

    def _may_grow(self, sequence: CachedSequence) -> bool:
        """Whether the answer of a sequence may need blocks that it does not have."""
        held = len(sequence.hold.blocks) if sequence.hold else self.pool.blocks_of(sequence.length)
        return self.pool.blocks_of(sequence.length + sequence.undrawn - 1) > held

    def _begin(self, sequence: CachedSequence) -> None:
        """Give a waiting sequence its blocks."""
        keys = sequence.findable
        hits = self.pool.match(keys)
        sequence.hold = self.pool.take(keys[:hits])
        sequence.computed = hits * self.pool.block
        missing = self.pool.blocks_of(sequence.length) - hits
        whole = self.pool.blocks_of(sequence.length + max(sequence.undrawn - 1, 0))
        self.pool.grow(sequence.hold, missing, whole - hits - missing)
        self._making.update(dict.fromkeys(keys[hits:], sequence))
        if sequence.prompt.picture and sequence.computed < sequence.picture_end:
            self.embeddings.use(sequence.prompt.picture.key)
            self._seers.add(sequence)
        if sequence.cached_tokens is None:
            self._count(sequence)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_AGE)

    def _count(self, sequence: CachedSequence) -> None:
        """Count a sequence that begins for the first time."""
        picture = sequence.prompt.picture
        sequence.cached_tokens = sequence.computed
        self._counts["prompt_tokens"] += len(sequence.prompt.tokens)
        self._counts["hit_tokens"] += sequence.computed
        self._counts["picture_hits"] += picture is not None and not sequence.is_encoded_for

    def _let_go(self, sequence: CachedSequence) -> None:
        """Take a running sequence's blocks; it would begin again."""
        assert sequence.hold is not None, "a waiting sequence"
        self.pool.release(sequence.hold)
        self._leave_picture(sequence)
        for key in [key for key, maker in self._making.items() if maker is sequence]:
            del self._making[key]
        self.running.remove(sequence)
        sequence.hold, sequence.computed = None, 0
        sequence.delivery.begin_again()

    def _leave_picture(self, sequence: CachedSequence) -> None:
        """Keep the embeddings of a sequence's picture no longer for it."""
        if sequence in self._seers and sequence.prompt.picture:
            self._seers.remove(sequence)
            self.embeddings.leave(sequence.prompt.picture.key)

    def come_back(self, sequence: CachedSequence, piece: Piece) -> None:
        """Note that a piece has been computed: others may take the blocks that it filled."""
        assert sequence.hold is not None, "a waiting sequence"
        sequence.is_under_way = False
        filled = sequence.computed // self.pool.block
        sequence.computed += len(piece.tokens)
        for number, key in islice(enumerate(sequence.keys(sequence.computed)), filled, None):
            self.pool.publish(sequence.hold, number, key)
            if self._making.get(key) is sequence:
                del self._making[key]
        if sequence.computed >= sequence.picture_end:
            self._leave_picture(sequence)
        if sequence.is_ended:
            self.remove(sequence)
