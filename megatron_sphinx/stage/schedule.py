"""The order in which pictures are encoded: those of each step, and of the validations between steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from megatron_sphinx.data.packing import Row
from megatron_sphinx.data.pixels import PixelLoader
from megatron_sphinx.data.plan import Planner
from megatron_sphinx.data.validation import HeldOut


class Scheduled(NamedTuple):
    """A micro-batch of all replicas, in the order of a run.

    Attributes:
        step: number of the step that it belongs to; of the one before it, for a micro-batch of a validation.
        number: of the micro-batch in the step, those of the validation behind the others.
        rows: of each replica.
        pixels: what reads its pictures; None where there are none, or where nobody reads.
    """

    step: int
    number: int
    rows: tuple[tuple[Row, ...], ...]
    pixels: PixelLoader | None = None


@dataclass(frozen=True)
class Schedule:
    """The micro-batches of a run, in the order in which language ranks take them and encoder ranks send them.

    Attributes:
        planner: of the training.
        pixels: what reads the pictures of the training; None where nobody reads.
        held_out: what is validated on; None for a run without validations.
        held_out_pixels: what reads its pictures.
    """

    planner: Planner
    pixels: PixelLoader | None = None
    held_out: HeldOut | None = None
    held_out_pixels: PixelLoader | None = None

    def between(self, first: int, last: int, *, is_owed: bool = False) -> Iterator[Scheduled]:
        """Yield the micro-batches of steps `first` to `last`, the last not among them, and of validations on the way.

        Args:
            first: the step to begin with.
            last: the one to end before.
            is_owed: whether there is a validation before the first step, which an earlier job did not finish.
        """
        if is_owed:
            yield from self._validation(first - 1, 0)
        for step in range(first, last):
            micro_batches = self.planner.step(step).micro_batches
            for number, rows in enumerate(micro_batches):
                yield Scheduled(step, number, rows, self.pixels)
            if self.held_out is not None and self.held_out.is_due(step + 1):
                yield from self._validation(step, len(micro_batches))

    def _validation(self, step: int, number: int) -> Iterator[Scheduled]:
        """Yield the micro-batches of the validation behind a step, counted from `number`."""
        assert self.held_out is not None, "nothing is validated on"
        planned = chain.from_iterable(plan.micro_batches for plan in self.held_out.plans)
        for place, rows in enumerate(chain(planned, self.held_out.sample_rounds), number):
            yield Scheduled(step, place, rows, self.held_out_pixels)
