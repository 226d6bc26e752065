"""Documents are tokenised in threads, while others are read and written; the libraries let Python go on meanwhile."""

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_sphinx.data.tokenizer import Tokenizer
from megatron_sphinx.prepare.text_items import Item

_BATCH_CHARACTERS = 2**18  # of a batch, but for one of a single document
_BATCH_ITEMS = 256
_MOST_THREADS = 8  # of a process

Encoded: TypeAlias = tuple[Item, NDArray[np.integer] | None]


class Crew:
    """Tokenises for all processes that are forked from this one, of which as many threads work at a time as may.

    While every process has a file, each has about one thread; those that are left with the last files get more.

    Args:
        tokenizer: of the model that will be trained.
        workers: how many threads of all processes work at a time.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer = tokenizer
        self._threads = min(workers, _MOST_THREADS)
        self._turns = multiprocessing.get_context("fork").Semaphore(workers)

    def encoded(self, items: Iterator[Item]) -> Iterator[Encoded]:
        """Yield items in their order, each with `[BOS] text [EOS]` as token ids where it has a text."""
        if self._threads == 1:
            for batch in _batches(items):
                yield from self._encode(batch)
            return
        waiting: deque[Future[list[Encoded]]] = deque()
        with ThreadPoolExecutor(self._threads, "tokenise") as pool:
            for batch in _batches(items):
                waiting.append(pool.submit(self._encode_in_turn, batch))
                if len(waiting) > self._threads + 1:
                    yield from waiting.popleft().result()
            for future in waiting:
                yield from future.result()

    def _encode_in_turn(self, batch: list[Item]) -> list[Encoded]:
        with self._turns:
            return self._encode(batch)

    def _encode(self, batch: list[Item]) -> list[Encoded]:
        """Tokenise a batch at once."""
        made = iter(self._tokenizer.encode_batch([item.text for item in batch if item.text is not None]))
        return [(item, None if item.text is None else self._closed(next(made))) for item in batch]

    def _closed(self, ids: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return token ids between BOS and EOS."""
        closed = np.empty(len(ids) + 2, self._tokenizer.identity.token_type)
        closed[0], closed[1:-1], closed[-1] = self._tokenizer.bos, ids, self._tokenizer.eos
        return closed


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield neighbouring items together, so many that a call of the library is worth its while."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.text or "")
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_ITEMS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
