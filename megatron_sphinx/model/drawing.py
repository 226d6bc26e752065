"""Numbers drawn from random streams of their own: bits that depend on no thread, no layout and no device."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sphinx.device import current_platform, own_cores
from megatron_sphinx.model.shards import Block

T = TypeVar("T")
R = TypeVar("R")
# Numbers drawn at once. From 2**15 on torch would divide copies among threads of its own, in each of our threads.
_PIECE = 2**15 - 16
_SIXTEEN = 16  # torch draws normal numbers by sixteens; pieces of whole sixteens are what the whole would have been


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int | None = None) -> list[R]:
    """Do something with each item without gradients: where a GPU waits, at once on a thread for each core.

    On the CPU ranks share its cores anyway, and may be forked from a process of several threads: there it is done on
    one thread, one item after the other.

    Args:
        work: what is done; torch lets other threads run while it computes.
        items: what it is done with.
        threads: how many threads; None for the above.

    Returns:
        The results, in the order of the items.

    Raises:
        Exception: what the work raised for the first item for which it raised anything, when all others are done.
    """

    def work_on(item: T) -> R:
        with torch.no_grad():  # each thread begins with gradients
            return work(item)

    if threads is None:
        threads = own_cores() if current_platform().is_cuda else 1
    with ThreadPoolExecutor(threads, "weights", current_platform().enter_thread) as pool:
        return [future.result() for future in [pool.submit(work_on, item) for item in items]]


def draw_normal(
    own: Tensor, whole: Sequence[int], blocks: Iterable[Block], std: float, source: torch.Generator
) -> None:
    """Fill a rank's part of a matrix with what the whole matrix holds there, drawn in fp32 around zero.

    The whole is drawn row by row, and never held: that takes less memory, and less time, since it stays in a core's
    cache. Its bits are those of one `normal_` of the whole.

    Args:
        own: the part, of any type and on any device; contiguous.
        whole: rows and columns of the whole matrix.
        blocks: boxes of the whole that lie one behind the other in `own`.
        std: standard deviation.
        source: the CPU generator of the matrix.
    """
    rows, columns = whole
    unit = _SIXTEEN // gcd(columns, _SIXTEEN)
    step = max(_PIECE // columns // unit, 1) * unit
    starts = list(range(0, rows, step))
    if len(starts) > 1 and (rows - starts[-1]) * columns < _SIXTEEN:
        starts.pop()  # fewer would be drawn otherwise
    buffer = torch.empty(max(end - start for start, end in _ranges(starts, rows)), columns, dtype=torch.float32)
    placed = []
    position = 0
    for block in blocks:
        (first, column), (height, width) = block.offset, block.shape
        placed.append((first, column, own.view(-1)[position : position + height * width].view(height, width)))
        position += height * width
    for start, end in _ranges(starts, rows):
        piece = buffer[: end - start].normal_(0.0, std, generator=source)
        for first, column, target in placed:
            top, bottom = max(start, first), min(end, first + len(target))
            if top < bottom:
                part = piece[top - start : bottom - start, column : column + target.shape[1]]
                target[top - first : bottom - first].copy_(part)


def _ranges(starts: Sequence[int], end: int) -> Iterable[tuple[int, int]]:
    """Give beginning and end of each of the ranges that begin at `starts`."""
    return zip(starts, [*starts[1:], end], strict=True)


class DrawingFrom(TorchDispatchMode):
    """Inside it, what draws from torch's default generator on this thread draws from another one.

    So libraries that take no generator draw the numbers that they would draw after `torch.manual_seed`, on several
    threads at once, and the default generator of the process stays as it is.

    Args:
        source: the generator.
    """

    def __init__(self, source: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source = source

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give the generator to an operation that draws; others are left alone."""
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and given.get("generator") is None:
            takes_one = any(argument.name == "generator" for argument in func._schema.arguments)
            func = func if takes_one else func.overloadpacket.generator
            given["generator"] = self._source
        return func(*args, **given)
