"""The engine's thread: requests of many threads, cancelled, refused, finished, failed."""

import random
import threading
import time

import pytest
from fake_executor import END, PICTURES, FakeExecutor, FakeText, answer_alone, scores_alone

from megatron_sphinx.errors import ConfigError, DataError
from megatron_sphinx.generation.answering import QueueFullError
from megatron_sphinx.generation.engine import Language
from megatron_sphinx.generation.limits import Limits
from megatron_sphinx.generation.requests import Finish, Generation, Prompt, Sampling
from megatron_sphinx.generation.service import ClosedError, Service

LANGUAGE = Language({END}, FakeText)
SHORT = Sampling(max_new_tokens=6, ignore_eos=True)


class GatedExecutor(FakeExecutor):
    """Computes a tick only while its gate is open; may fail in one."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.gate, self.entered, self.error, self.polls = threading.Event(), threading.Event(), None, 0
        self.gate.set()

    def encoded(self):
        self.polls += 1
        return super().encoded()

    def tick(self, tick):
        self.entered.set()
        assert self.gate.wait(20)
        if self.error:
            raise self.error
        return super().tick(tick)


class Heard:
    """A listener that can be waited for."""

    def __init__(self):
        self.chunks, self._done = [], threading.Event()

    def __call__(self, chunk):
        assert not self._done.is_set()
        self.chunks.append(chunk)
        if isinstance(chunk, Exception) or chunk.finish:
            self._done.set()

    @property
    def last(self):
        assert self._done.wait(20)
        return self.chunks[-1]


@pytest.fixture
def executor():
    return GatedExecutor(blocks=64, stages=2)


@pytest.fixture
def service(executor):
    service = Service(executor, LANGUAGE, Limits(sequences=2, waiting=3))
    yield service
    executor.gate.set()
    service.close(finish=False)


def hold_up(service, executor):
    """Keep the engine's thread in a tick; the request that it computes."""
    executor.gate.clear()
    executor.entered.clear()
    heard = Heard()
    ticket = service.submit(Prompt((2, 3)), SHORT, heard)
    assert executor.entered.wait(20)
    return ticket, heard


def test_requests_of_many_threads_are_answered_each_for_itself():
    executor = GatedExecutor(blocks=40, replicas=2)
    service = Service(executor, LANGUAGE, Limits(sequences=4))
    faults = []

    def ask(number):
        draw = random.Random(number)
        for _ in range(10):
            picture = draw.choice([None, PICTURES[5], PICTURES[8]])
            prompt = Prompt((2, *(0,) * (picture.positions if picture else 0), draw.randint(2, 20)), picture)
            heard = Heard()
            ticket = service.submit(prompt, SHORT, heard)
            if draw.random() < 0.3:
                ticket.cancel()
            finish = heard.last.finish
            tokens = Generation.of(heard.chunks, len(prompt.tokens), ticket.cached_tokens).tokens
            expected = tuple(answer_alone(prompt, SHORT)[0])
            if tokens != (expected if finish == Finish.LENGTH else expected[: len(tokens)]):
                faults.append((prompt, tokens))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    service.close()
    load = service.load()
    assert not faults
    assert (load.finished, load.waiting, load.running) == (80, 0, 0)
    assert load.places == 2 * 40 * 4


def test_a_continuation_is_scored(service):
    heard = Heard()
    service.score(Prompt((2, 3)), (4, 5), heard)
    assert tuple(one.logprob for one in heard.last.logprobs) == scores_alone(Prompt((2, 3)), (4, 5))


def test_a_full_queue_refuses_and_has_room_again(service, executor):
    ticket, first = hold_up(service, executor)
    waiting = [Heard() for _ in range(3)]
    for heard in waiting:
        service.submit(Prompt((2, 5)), SHORT, heard)
    assert service.load().waiting == 3
    with pytest.raises(
        QueueFullError, match=r"^waiting=3: as many requests as may are waiting already; ask again later$"
    ):
        service.submit(Prompt((2, 6)), SHORT, print)
    executor.gate.set()
    assert {heard.last.finish for heard in (first, *waiting)} == {Finish.LENGTH}
    heard = Heard()
    service.submit(Prompt((2, 6)), SHORT, heard)
    assert heard.last.finish == Finish.LENGTH
    ticket.cancel()  # it has ended, and hears nothing more


def test_a_request_is_cancelled_by_its_own_listener(service):
    tickets, chunks, is_over = [], [], threading.Event()
    is_handed_in = threading.Event()

    def listen(chunk):
        chunks.append(chunk)
        is_handed_in.wait(20)
        tickets[0].cancel()
        if chunk.finish:
            is_over.set()

    tickets.append(service.submit(Prompt((2, 3)), Sampling(max_new_tokens=50, ignore_eos=True), listen))
    is_handed_in.set()
    assert is_over.wait(20)
    assert chunks[-1].finish == Finish.CANCELLED
    assert sum(len(chunk.tokens) for chunk in chunks) < 50


def test_a_closed_service_finishes_what_it_has_and_takes_no_more(service, executor):
    _, first = hold_up(service, executor)
    second = Heard()
    service.submit(Prompt((2, 5)), SHORT, second)
    closing = threading.Thread(target=service.close)
    closing.start()
    while not service.is_closing:
        time.sleep(0.001)
    with pytest.raises(ClosedError, match=r"^the model is being closed: it takes no request any more; load it again$"):
        service.submit(Prompt((2, 6)), SHORT, print)
    executor.gate.set()
    closing.join(20)
    assert (first.last.finish, second.last.finish) == (Finish.LENGTH, Finish.LENGTH)


def test_a_service_closed_at_once_cancels_what_it_has(service, executor):
    _, first = hold_up(service, executor)
    second = Heard()
    service.submit(Prompt((2, 5)), SHORT, second)
    closing = threading.Thread(target=service.close, kwargs={"finish": False})
    closing.start()
    executor.gate.set()
    closing.join(20)
    assert not closing.is_alive()
    assert second.last.finish == Finish.CANCELLED
    assert first.last.finish in (Finish.CANCELLED, Finish.LENGTH)


def test_requests_in_hand_and_later_ones_hear_of_an_executor_that_fails(service, executor):
    _, first = hold_up(service, executor)
    second = Heard()
    service.submit(Prompt((2, 5)), SHORT, second)
    assert service.error is None
    executor.error = DataError("rank 3 is lost")
    executor.gate.set()
    assert first.last is second.last is executor.error
    service.close()
    assert service.error is executor.error
    with pytest.raises(DataError, match=r"^rank 3 is lost$"):
        service.submit(Prompt((2, 6)), SHORT, print)
    assert service.load().finished == 2


def test_the_thread_sleeps_while_there_is_nothing_to_do(service, executor):
    heard = Heard()
    service.submit(Prompt((2, 3)), SHORT, heard)
    assert heard.last.finish
    time.sleep(0.1)  # what is under way comes back
    polls = executor.polls
    time.sleep(0.2)
    assert executor.polls == polls


def test_a_fault_is_told_to_the_thread_that_asks(service):
    with pytest.raises(DataError, match=r"prompt='': has no tokens"):
        service.submit(Prompt(()), SHORT, print)
    with pytest.raises(ConfigError, match=r"sampling.temperature=-1: must be at least 0"):
        service.submit(Prompt((2,)), Sampling(temperature=-1), print)
