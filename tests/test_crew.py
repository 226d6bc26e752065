"""Documents that are tokenised in threads: in their order, as one by one, and with what stands between them."""

import random
import threading

import pytest

from megatron_sphinx.prepare import crew
from megatron_sphinx.prepare.crew import Crew
from megatron_sphinx.prepare.text_items import Item


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(crew, "_BATCH_ITEMS", 5)
    monkeypatch.setattr(crew, "_BATCH_CHARACTERS", 300)


def items_of(count):
    draw = random.Random(count)
    for number in range(count):
        text = "".join(draw.choices("abc d", k=draw.randint(1, 150))) if draw.random() < 0.8 else None
        yield Item(f"row {number}", text)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 4, 200])
def test_each_item_comes_in_its_place_with_its_tokens(tiny, workers, count):
    tokenizer = tiny.tokenizer
    made = list(Crew(tokenizer, workers).encoded(items_of(count)))
    assert [item for item, _ in made] == list(items_of(count))
    for item, ids in made:
        if item.text is None:
            assert ids is None
        else:
            assert ids.tolist() == [tokenizer.bos, *tokenizer.encode(item.text), tokenizer.eos]
            assert ids.dtype == tokenizer.identity.token_type


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_the_file_ends_the_work(tiny, workers):
    def items():
        yield from items_of(50)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(Crew(tiny.tokenizer, workers).encoded(items()))


@pytest.mark.usefixtures("small_batches")
def test_no_more_threads_work_at_a_time_than_there_are_workers_and_few_batches_wait(tiny):
    working, most, read = [], [], 0
    lock = threading.Lock()

    class Tokenizer:
        identity, bos, eos = tiny.tokenizer.identity, tiny.tokenizer.bos, tiny.tokenizer.eos

        def encode_batch(self, texts):
            with lock:
                working.append(1)
                most.append(len(working))
            try:
                return tiny.tokenizer.encode_batch(texts)
            finally:
                working.pop()

    def items():
        nonlocal read
        for item in items_of(500):
            read += 1
            yield item

    encoded = Crew(Tokenizer(), 2).encoded(items())
    next(encoded)
    assert read <= 5 * 5
    assert len(list(encoded)) == 499
    assert max(most) <= 2
