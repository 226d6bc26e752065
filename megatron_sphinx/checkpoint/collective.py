"""What ranks that keep checkpoints decide together: one that fails makes all fail, with the first one's words.

The ranks talk over the group for storage, which waits longer than the group of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sphinx.checkpoint.slices import cause_of, reason_of
from megatron_sphinx.errors import CheckpointError, SphinxError, remedy_of

if TYPE_CHECKING:  # tools read checkpoints without megatron-core, whose import takes seconds
    from megatron_sphinx.parallel.groups import ProcessGroups

T = TypeVar("T")


def all_or_none(groups: ProcessGroups, work: Callable[[], T]) -> T:
    """Do what may fail on one rank alone, and fail on every language rank then; what follows waits for all.

    Raises:
        CheckpointError: the work has failed on a rank.
    """
    result, error = None, None
    try:
        result = work()
    except CheckpointError as raised:
        error = raised
    errors = gathered(groups, error)
    if first := next(filter(None, errors), None):
        raise first
    return cast(T, result)


def write_together(groups: ProcessGroups, target: Path, work: Callable[[], Any]) -> list[Any]:
    """Do this rank's part of writing a checkpoint, and fail on every rank where one fails.

    Args:
        groups: of this rank.
        target: the checkpoint, for the message.
        work: this rank's part.

    Returns:
        What the work of each rank has returned.

    Raises:
        CheckpointError: a rank could not write; its `is_shared` says that all ranks raise it.
    """
    result, reason = None, ""
    try:
        result = work()
    except SphinxError as error:
        reason = str(error)
    except (Exception, CheckpointException) as error:  # torch reports a full disk in errors of its own
        reason = (
            f"{target}: rank {groups.seat.rank} could not write it ({reason_of(error)}); earlier checkpoints are "
            f"untouched; {remedy_of(cause_of(error))}, then resume with checkpoint.resume=auto"
        )
    outcomes = gathered(groups, (reason, result))
    for text, _ in outcomes:
        if text:
            failure = CheckpointError(text)
            failure.is_shared = True
            raise failure
    return [value for _, value in outcomes]


def from_first(groups: ProcessGroups, work: Callable[[], T]) -> T:
    """Return on every language rank what the work returns on the first one, which alone does it."""
    box: list[Any] = [work() if groups.seat.rank == 0 else None]
    dist.broadcast_object_list(box, src=0, group=groups.storage)
    return cast(T, box[0])


def gathered(groups: ProcessGroups, value: T) -> list[T]:
    """Return the values of all language ranks, in the order of ranks."""
    values = [value] * groups.layout.language
    dist.all_gather_object(values, value, group=groups.storage)
    return values
