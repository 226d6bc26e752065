"""The engine: whatever comes together, each answer is what it would be alone, and nothing is computed for nothing."""

import random
from collections import Counter
from threading import Event, Thread, get_ident

import pytest
from fake_executor import END, PICTURES, WORDS, FakeExecutor, FakeText, answer_alone, scores_alone

from megatron_sphinx.errors import ConfigError, DataError, SphinxError
from megatron_sphinx.generation.engine import Engine, EngineError, Language
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.requests import Chunk, Finish, Generation, Prompt, Sampling
from megatron_sphinx.generation.service import ClosedError, QueueFull, Service

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
            blocks=draw.choice([48, 64, 200]) // block, encoding_ticks=draw.randint(1, 6), kept=limits.picture_positions,
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


@pytest.mark.parametrize("hundred", range(4))
def test_answers_are_those_of_requests_alone(hundred):
    for seed in range(100 * hundred, 100 * hundred + 100):
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
