"""An executor without a model: a strict one, whose next token depends on all that is in the places it is given."""

from collections import deque
from zlib import crc32

from megatron_sphinx.generation.requests import Finish, Picture, Prompt, Sampling, TokenLogprob
from megatron_sphinx.generation.ticks import Draw, Outcome

END, WORDS = 1, 23  # ids are 1 to 23; 0 is a picture's position
PICTURES = {positions: Picture(f"{positions:064d}", b"", 8, 8, (0,), positions) for positions in (1, 3, 5, 8, 13)}


def mixed(*values):
    return crc32(repr(values).encode())


def state_of(before, token, position, picture):
    """What a place holds: like keys and values of a deep layer, it depends on all places before it."""
    return mixed(before, token, position, picture if not token else None)


def drawn_from(states, draw):
    draw = (
        draw.seed,
        draw.number,
        draw.temperature,
        draw.top_k,
        draw.top_p,
        draw.repetition_penalty,
        sorted(draw.seen),
    )
    return 1 + mixed(states, draw) % WORDS


def likelihood(states, token):
    return -(mixed(states, token) % 1000) / 100


class FakeExecutor:
    """Computes at once, and answers `stages` - 1 ticks later; whatever is not in its place is an AssertionError."""

    def __init__(self, *, replicas=1, stages=1, block=4, blocks=32, positions=128, encoding_ticks=2, kept=2**30):
        self.replicas, self.stages, self.block, self.places = replicas, stages, block, block * blocks
        self.positions, self._encoding_ticks, self._kept = positions, encoding_ticks, kept
        self._states = [{} for _ in range(replicas)]  # of each place: (position, state)
        self._under_way = deque(maxlen=stages - 1)  # places written by each tick, and outcomes
        self._pictures = [{} for _ in range(replicas)]  # positions, and polls before it is ready
        self.encodings, self.ticks = [], []
        self.computed = 0

    def encode(self, picture, replica):
        assert picture.key not in self._pictures[replica], "encoded twice"
        self._pictures[replica][picture.key] = [picture.positions, self._encoding_ticks]
        self.encodings.append((picture.key, replica))
        sizes = [positions for positions, _ in self._pictures[replica].values()]
        assert len(sizes) == 1 or sum(sizes) <= self._kept, "too many pictures"

    def encoded(self):
        ready = []
        for replica, pictures in enumerate(self._pictures):
            for key, state in pictures.items():
                state[1] -= 1
                if state[1] == 0:
                    ready.append((key, replica))
        return ready

    def tick(self, tick):
        assert len(tick.pieces) == len(tick.forgotten) == self.replicas
        self.ticks.append(tick)
        for pictures, forgotten in zip(self._pictures, tick.forgotten, strict=True):
            for key in forgotten:
                assert pictures.pop(key)[1] <= 0, "forgotten before it was ready"
        written = [set() for _ in range(self.replicas)]
        outcomes = [
            [self._compute(replica, piece, written[replica]) for piece in pieces]
            for replica, pieces in enumerate(tick.pieces)
        ]
        for replica, pieces in enumerate(tick.pieces):
            for piece in pieces:
                assert not written[replica] & set(places_of(piece)[: piece.start]), "reads what this tick computes"
        if self.stages == 1:
            return outcomes
        earlier = self._under_way[0][1] if len(self._under_way) == self.stages - 1 else None
        self._under_way.append((written, outcomes))
        return earlier

    def _compute(self, replica, piece, written):
        states, places = self._states[replica], places_of(piece)
        assert piece.tokens
        assert len(places) == piece.start + len(piece.tokens) <= self.positions
        assert len(set(places)) == len(places)
        assert max(places) < self.places
        under_way = set().union(*(those[replica] for those, _ in self._under_way))
        assert not under_way & set(places), "a place is under way"
        for number, place in enumerate(places[: piece.start]):
            assert states[place][0] == number, "a place of another sequence"
        new = places[piece.start :]
        assert not written & set(new), "two sequences write one place"
        written |= set(new)
        self.computed += len(new)
        for position, (place, token) in enumerate(zip(new, piece.tokens, strict=True), piece.start):
            if token == 0:
                positions, polls = self._pictures[replica][piece.picture]
                assert polls <= 0, "the picture is not ready"
                assert 1 <= position <= positions
            before = states[places[position - 1]][1] if position else 0
            states[place] = (position, state_of(before, token, position, piece.picture))
        assert (piece.picture is not None) == (0 in piece.tokens), "a picture for nothing"
        known = tuple(states[place][1] for place in places)
        drawn = None
        if piece.draw:
            token = drawn_from(known, piece.draw)
            logprob = 0.0 if piece.draw.top_logprobs is None else likelihood(known, token)
            drawn = TokenLogprob(token, logprob, ((token, logprob),) * (piece.draw.top_logprobs or 0))
        return Outcome(
            drawn, tuple(likelihood(known[: piece.start + number + 1], token) for number, token in piece.targets)
        )


def places_of(piece):
    return [place for first, tokens in piece.segments for place in range(first, first + tokens)]


class FakeText:
    """Three letters; holds back as many as may begin a stop string."""

    def __init__(self, stop):
        self._stop, self._text, self._shown = stop, "", 0

    def feed(self, token):
        self._text += "abc"[token % 3]
        ends = [self._text.find(stop) for stop in self._stop if stop in self._text]
        end = min(ends) if ends else len(self._text) - max([len(stop) - 1 for stop in self._stop], default=0)
        shown = self._text[self._shown : max(end, self._shown)]
        self._shown += len(shown)
        return shown, bool(ends)

    def rest(self):
        return self._text[self._shown :]


def states_of(prompt, tokens):
    states, picture = [], prompt.picture.key if prompt.picture else None
    for position, token in enumerate(tokens):
        states.append(state_of(states[-1] if states else 0, token, position, picture))
    return tuple(states)


def answer_alone(prompt: Prompt, sampling: Sampling):
    """Tokens, text and finish of an answer, without an engine."""
    tokens, text, is_stopped = [], FakeText(sampling.stop), False
    shown = ""
    behind = 1 + prompt.picture.positions if prompt.picture else 1
    while len(tokens) < sampling.max_new_tokens:
        seen = ()
        if sampling.repetition_penalty != 1:
            seen = {*prompt.tokens[:1], *prompt.tokens[behind:], *tokens}
        draw = Draw(
            sampling.seed, len(tokens), sampling.temperature, sampling.top_k, sampling.top_p,
            sampling.repetition_penalty, seen, sampling.top_logprobs,
        )  # fmt: skip
        tokens.append(drawn_from(states_of(prompt, (*prompt.tokens, *tokens)), draw))
        if tokens[-1] == END and not sampling.ignore_eos:
            return tokens, shown + text.rest(), Finish.STOP
        new, is_stopped = text.feed(tokens[-1])
        shown += new
        if is_stopped:
            return tokens, shown, Finish.STOP
    return tokens, shown + text.rest(), Finish.LENGTH


def scores_alone(prompt: Prompt, continuation):
    states = states_of(prompt, (*prompt.tokens, *continuation))
    first = len(prompt.tokens)
    return tuple(likelihood(states[: first + number], token) for number, token in enumerate(continuation))
