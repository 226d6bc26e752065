"""What a rank that fails says: one rank speaks for all, with the cause and not with what followed from it."""

import traceback

import torch.distributed as dist

from megatron_sphinx.console import last_words, leave_to_torchrun
from megatron_sphinx.errors import SphinxError
from megatron_sphinx.liveness.lifeline import Lifeline


def report(error: Exception, lifeline: Lifeline, command: str) -> int:
    """Say on stderr what ended this rank, unless another rank has said it or will; the exit status.

    Args:
        error: what ended it.
        lifeline: of the rank.
        command: what the job runs.
    """
    if isinstance(error, SphinxError):
        is_mine = lifeline.is_first_rank if error.is_shared else lifeline.announce(error.exit_status, str(error))
        (last_words if is_mine else leave_to_torchrun)(f"megatron-sphinx {command}: {error}")
        return error.exit_status
    end = lifeline.why_broken() if is_of_connection(error) else lifeline.ended()
    if end is not None and end["by"] == lifeline.name:  # its watcher did, and has said so
        return int(end["status"])
    if end is not None:
        last_words(f"[{lifeline.name}] leaves: {end['by']} ended the job ({end['reason']})")
        return int(end["status"])
    text = "".join(traceback.format_exception(error))
    last_words(f"[{lifeline.name}] failed:\n{text}")
    return 1


def is_of_connection(error: Exception) -> bool:
    """Tell whether an error says no more than that another rank does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
