"""The engine: whatever comes together, each answer is what it would be alone, and nothing is computed for nothing."""

import random

import pytest
from fake_executor import END, PICTURES, WORDS, FakeExecutor, FakeText, answer_alone, scores_alone

from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.generation.engine import Engine, EngineError, Language
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.requests import Finish, Prompt, Sampling

LANGUAGE = Language({END}, FakeText)


def prompt_of(*tokens, picture=None):
    return Prompt((2, *(0,) * (picture.positions if picture else 0), *tokens), picture)


class Asked:
    """A request, what its listener hears, and what it should."""

    def __init__(self, engine, prompt, sampling=None, continuation=()):
        self.prompt, self.sampling, self.continuation = prompt, sampling, continuation
        self.heard = []
        self.is_cancelled = False
        self.sequence = (
            engine.answer(prompt, sampling, self.heard.append)
            if sampling
            else engine.score(prompt, continuation, self.heard.append)
        )
        engine.add(self.sequence)

    @property
    def is_done(self):
        return bool(self.heard) and self.heard[-1].finish is not None

    def check(self):
        assert [chunk.finish is not None for chunk in self.heard] == [False] * (len(self.heard) - 1) + [True]
        text = "".join(chunk.text for chunk in self.heard)
        tokens = [token for chunk in self.heard for token in chunk.tokens]
        logprobs = [one for chunk in self.heard for one in chunk.logprobs]
        assert all(chunk.text or chunk.finish for chunk in self.heard)
        if self.sampling is None:
            if self.heard[-1].finish == Finish.LENGTH:
                assert tokens == list(self.continuation) == [one.token for one in logprobs]
                assert tuple(one.logprob for one in logprobs) == scores_alone(self.prompt, self.continuation)
            else:
                assert self.is_cancelled
            return
        expected, expected_text, finish = answer_alone(self.prompt, self.sampling)
        assert tokens == expected[: len(tokens)]
        assert len(logprobs) == (0 if self.sampling.top_logprobs is None else len(tokens))
        assert all(len(one.top) == self.sampling.top_logprobs for one in logprobs)
        if self.heard[-1].finish == Finish.CANCELLED:
            assert self.is_cancelled
            assert expected_text.startswith(text) or self.sampling.stop
        else:
            assert (tokens, text, self.heard[-1].finish) == (expected, expected_text, finish)


def run(engine, most_steps=20_000):
    for _ in range(most_steps):
        if engine.is_idle:
            return
        engine.step()
    pytest.fail("a request never ends")


def check_nothing_is_held(engine):
    for replica in engine._replicas:
        assert replica.pool.available == replica.pool.count
        assert not any(replica.pool._holders)
        assert not replica.pool._claims
        assert not replica._making
        assert not replica.promised
        assert not replica.waiting
        assert not replica.running
        assert not any(replica.embeddings._users.values())


class Workload:
    """Requests with shared beginnings, pictures, cancels and odd limits, by a seed."""

    def __init__(self, seed):
        self.draw = draw = random.Random(seed)
        limits = Limits(
            new_tokens=draw.choice([1, 2, 5, 16, 64]),
            sequences=draw.choice([1, 2, 3, 8]),
            picture_positions=draw.choice([0, 8, 15, 100]),
            encodings=draw.choice([1, 3]),
        )
        block = draw.choice([1, 2, 4, 8])
        self.executor = FakeExecutor(
            replicas=draw.randint(1, 3), stages=draw.randint(1, 3), block=block, positions=64,
            blocks=draw.choice([48, 64, 200]) // block, encoding_ticks=draw.randint(1, 6),
            kept=limits.picture_positions,
        )  # fmt: skip
        self.engine = Engine(self.executor, LANGUAGE, limits)
        pictures = draw.sample([*PICTURES.values()], 3)
        beginnings = [[draw.randint(1, WORDS) for _ in range(draw.randint(0, 10))] for _ in range(3)]
        self.prompts = [
            prompt_of(*draw.choice(beginnings), *(draw.randint(1, 3) for _ in range(draw.randint(0, 8))),
                      picture=draw.choice([None, *pictures]))
            for _ in range(10)
        ]  # fmt: skip
        self.asked = []

    def ask(self):
        draw = self.draw
        prompt = draw.choice(self.prompts)
        if draw.random() < 0.2:
            tokens = tuple(draw.randint(1, WORDS) for _ in range(draw.randint(1, 8)))
            self.asked.append(Asked(self.engine, prompt, continuation=tokens))
            return
        sampling = Sampling(
            max_new_tokens=draw.randint(1, 12), seed=draw.randint(0, 3), temperature=draw.choice([0.0, 0.7]),
            repetition_penalty=draw.choice([1.0, 1.2]), stop=draw.choice([(), (), ("abc",), ("ba", "ccc")]),
            top_logprobs=draw.choice([None, 0, 3]), ignore_eos=draw.random() < 0.2,
        )  # fmt: skip
        self.asked.append(Asked(self.engine, prompt, sampling))

    def run(self):
        for _ in range(self.draw.randint(1, 25)):
            for _ in range(self.draw.choice([0, 1, 1, 6])):
                self.ask()
            if self.asked and self.draw.random() < 0.3:
                asked = self.draw.choice(self.asked)
                asked.is_cancelled |= not asked.is_done
                self.engine.cancel(asked.sequence)
            self.engine.step()
        run(self.engine)
        return self


@pytest.mark.parametrize("part", range(4))
def test_answers_are_those_of_requests_alone(part):
    for seed in range(60 * part, 60 * part + 60):
        workload = Workload(seed).run()
        for asked in workload.asked:
            asked.check()
        check_nothing_is_held(workload.engine)
        load = workload.engine.load()
        assert load.finished == len(workload.asked)
        assert (load.waiting, load.running) == (0, 0)
        assert load.pictures == len(workload.executor.encodings)


def test_equal_requests_give_equal_ticks():
    for seed in range(20):
        assert Workload(seed).run().executor.ticks == Workload(seed).run().executor.ticks


LONG = Sampling(max_new_tokens=10, ignore_eos=True)


def engine_of(executor, **limits):
    return Engine(executor, LANGUAGE, Limits(**limits))


def test_what_prompts_share_is_computed_once():
    executor = FakeExecutor(blocks=200)
    engine, picture = engine_of(executor), PICTURES[13]
    shared = [7, 8, 9, 10, 11, 12]  # with BOS and the picture five blocks
    asked = [Asked(engine, prompt_of(*shared, question, 5, picture=picture), LONG) for question in range(1, 17)]
    run(engine)
    assert executor.computed == 20 + 16 * (2 + 9)
    assert executor.encodings == [(picture.key, 0)]
    load = engine.load()
    assert (load.prompt_tokens, load.hit_tokens, load.new_tokens) == (16 * 22, 15 * 20, 160)
    assert (load.pictures, load.picture_hits, load.finished) == (1, 15, 16)
    assert [one.sequence.cached_tokens for one in asked] == [0, *[20] * 15]


def test_a_picture_whose_positions_are_cached_is_not_encoded_again():
    executor = FakeExecutor(blocks=200)
    engine = engine_of(executor, picture_positions=13)
    shown, other = prompt_of(7, 7, 7, picture=PICTURES[13]), prompt_of(7, 7, picture=PICTURES[8])
    for prompt in (shown, other, shown):  # the second picture drives out the first
        Asked(engine, prompt, LONG)
        run(engine)
    assert executor.encodings == [(PICTURES[13].key, 0), (PICTURES[8].key, 0)]
    assert [key for tick in executor.ticks for key in tick.forgotten[0]] == [PICTURES[13].key]


def test_pictures_of_the_first_in_the_queue_do_not_go_for_later_ones():
    executor = FakeExecutor(blocks=200)
    engine = engine_of(executor, picture_positions=13, sequences=3, new_tokens=2)
    Asked(engine, prompt_of(3, picture=PICTURES[1]), Sampling(max_new_tokens=30, ignore_eos=True))
    for size in (3, 8, 5, 13):
        Asked(engine, prompt_of(3, picture=PICTURES[size]), LONG)
    run(engine)
    assert [int(key) for key, _ in executor.encodings] == [1, 3, 8, 5, 13]


def test_an_equal_prompt_computes_its_last_token_anew():
    executor = FakeExecutor()
    engine, prompt = engine_of(executor), prompt_of(*range(3, 10))  # two blocks
    for expected in (0, 4):
        asked = Asked(engine, prompt, Sampling(max_new_tokens=1))
        run(engine)
        asked.check()
        assert asked.sequence.cached_tokens == expected


def test_other_pictures_and_other_beginnings_are_other_blocks():
    executor = FakeExecutor()
    engine = engine_of(executor)
    text = prompt_of(*range(3, 12))
    Asked(engine, text, LONG)
    Asked(engine, prompt_of(5, 6, 7, picture=PICTURES[5]), LONG)
    run(engine)
    same_numbers = PICTURES[5].__class__("f" * 64, b"", 8, 8, (0,), 5)
    for prompt in (prompt_of(5, 6, 7, picture=same_numbers), prompt_of(4, *range(4, 12))):
        asked = Asked(engine, prompt, LONG)
        run(engine)
        assert asked.sequence.cached_tokens == 0


def test_scoring_shares_the_prompt():
    executor = FakeExecutor()
    engine, prompt = engine_of(executor), prompt_of(*range(3, 11))  # nine tokens
    asked = [Asked(engine, prompt, continuation=(word, 4, 4)) for word in range(5, 10)]
    run(engine)
    for one in asked:
        one.check()
    assert executor.computed == 8 + 5 * 3


def test_long_prompts_are_computed_in_parts_while_answers_go_on():
    executor = FakeExecutor(blocks=64)
    engine = engine_of(executor, new_tokens=8)
    Asked(engine, prompt_of(5), LONG)
    engine.step()
    Asked(engine, prompt_of(*[9] * 50), LONG)
    run(engine)
    sizes = [[len(piece.tokens) for piece in tick.pieces[0]] for tick in executor.ticks]
    assert sizes[1:8] == [[1, 7]] * 7
    assert max(map(sum, sizes)) == 8


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_stage_has_its_share_of_answers(stages):
    executor = FakeExecutor(stages=stages, blocks=200)
    engine = engine_of(executor)
    for word in range(3 * stages):
        Asked(engine, prompt_of(3, word + 1), Sampling(max_new_tokens=40, ignore_eos=True))
    run(engine)
    assert {len(tick.pieces[0]) for tick in executor.ticks[stages + 1 : 30 * stages]} == {3}


def test_requests_go_where_their_picture_is_and_others_where_there_is_less_to_do():
    executor = FakeExecutor(replicas=2, blocks=200)
    engine = engine_of(executor)
    short = Sampling(max_new_tokens=1)
    pictures = [Asked(engine, prompt_of(5, picture=PICTURES[size]), short) for size in (13, 8)]
    others = [Asked(engine, prompt_of(number, picture=PICTURES[size]), short) for number in (6, 7) for size in (13, 8)]
    assert [one.sequence.replica for one in (*pictures, *others)] == [0, 1] * 3
    run(engine)
    assert len(executor.encodings) == 2
    texts = [Asked(engine, prompt_of(*[number] * 9), short) for number in range(1, 21)]
    assert sum(one.sequence.replica for one in texts) == 10


def test_one_popular_picture_does_not_leave_a_replica_without_work():
    engine = engine_of(FakeExecutor(replicas=2, blocks=200))
    asked = [Asked(engine, prompt_of(number, 5, picture=PICTURES[13]), LONG) for number in range(1, 41)]
    assert 10 < sum(one.sequence.replica for one in asked) < 30


def test_the_youngest_gives_way_and_ends_all_the_same():
    executor = FakeExecutor(blocks=8, block=2)
    engine = engine_of(executor)
    asked = [Asked(engine, prompt_of(number), Sampling(max_new_tokens=14, ignore_eos=True)) for number in (3, 4, 5)]
    ended = []
    while not engine.is_idle:
        engine.step()
        ended += [one for one in asked if one.is_done and one not in ended]
    assert ended == asked
    for one in asked:
        one.check()
    assert executor.computed > 3 * 15, "nothing gave way"


def test_no_request_begins_only_to_give_way():
    executor = FakeExecutor(blocks=8, block=2)
    engine = engine_of(executor)
    for number in range(3, 11):
        Asked(engine, prompt_of(number), Sampling(max_new_tokens=3, ignore_eos=True))  # one block, two in the end
    run(engine)
    assert executor.computed == 8 * 4


def test_a_large_request_is_not_passed_by_small_ones_for_ever():
    engine = engine_of(FakeExecutor(blocks=10))
    small = [Asked(engine, prompt_of(number), LONG) for number in (3, 4)]
    large = Asked(engine, prompt_of(*[9] * 28), LONG)
    for number in range(200):
        small.append(Asked(engine, prompt_of(number + 1), Sampling(max_new_tokens=4 + number % 7, ignore_eos=True)))
        engine.step()
        if large.is_done:
            break
    large.check()
    assert sum(one.is_done for one in small) < 10
    run(engine)


def test_a_cancelled_request_gives_back_what_it_holds():
    for steps in range(12):
        engine = engine_of(FakeExecutor(stages=3))
        gone = Asked(engine, prompt_of(4, 5, 6, picture=PICTURES[5]), LONG)
        other = Asked(engine, prompt_of(4, 5, 6, picture=PICTURES[5]), LONG)
        for _ in range(steps):
            engine.step()
        engine.cancel(gone.sequence)
        engine.cancel(gone.sequence)
        assert [chunk.finish for chunk in gone.heard if chunk.finish] == [Finish.CANCELLED]
        run(engine)
        other.check()
        check_nothing_is_held(engine)


def test_a_listener_that_fails_ends_its_own_request_only():
    engine = engine_of(FakeExecutor())

    def fail(chunk):
        raise ValueError(chunk)

    engine.add(engine.answer(prompt_of(3), LONG, fail))
    other = Asked(engine, prompt_of(3), LONG)
    run(engine)
    other.check()
    check_nothing_is_held(engine)


class BrokenExecutor(FakeExecutor):
    def __init__(self, error, **sizes):
        super().__init__(**sizes)
        self._error = error

    def tick(self, tick):
        if len(self.ticks) == 5:
            raise self._error
        return super().tick(tick)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DataError("a rank is lost"), DataError, "^a rank is lost$"),
        (
            RuntimeError("no\nmemory"),
            EngineError,
            r"^the model cannot compute .RuntimeError: no memory.; load it again$",
        ),
    ],
)
def test_all_requests_hear_of_an_executor_that_fails(error, kind, message):
    engine = engine_of(BrokenExecutor(error, stages=2), sequences=1)
    heard = [[], []]
    for number, those in enumerate(heard):
        engine.add(engine.answer(prompt_of(number + 1), LONG, those.append))
    with pytest.raises(kind, match=message) as raised:
        run(engine)
    assert [those[-1] for those in heard] == [raised.value] * 2


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        (Prompt(()), LONG, "^prompt='': has no tokens; begin it with BOS$"),
        (prompt_of(*[3] * 50), LONG, "prompt of 51 tokens with 10 new ones: the model has room for 60 together; "
                                     "shorten it, or ask for at most 9 new ones"),
        (prompt_of(*[3] * 60), LONG, "prompt of 61 tokens: the model has room for 60 with its answer; shorten it"),
        (prompt_of(*[3] * 36), LONG, "the cache has room for 40 together; shorten it, or ask for at most 3 new ones"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(prompt, sampling, message):
    engine = engine_of(FakeExecutor(blocks=10, positions=60))
    with pytest.raises(DataError, match=message):
        engine.answer(prompt, sampling, print)
    Asked(engine, prompt_of(*[3] * 29), LONG)  # the longest that does
    run(engine)


def test_nothing_to_score_and_numbers_out_of_their_ranges_are_refused():
    engine = engine_of(FakeExecutor())
    with pytest.raises(
        DataError, match=r"^continuation='': there is nothing to score; give a text of one token or more$"
    ):
        engine.score(prompt_of(3), (), print)
    with pytest.raises(ConfigError, match=r"sampling\.top_p=2: must be between 0 and 1"):
        engine.answer(prompt_of(3), Sampling(top_p=2), print)
