"""What each rank computes on: a GPU of its own, or else every rank of the job on the CPU.

Ranks see all GPUs of their host, or each only its own, so a number says nothing: GPUs are told apart by their UUIDs.
The ranks exchange what they see before any process group exists, since its backend follows from the answer.
"""

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_sphinx.device import Platform, chosen_platform, local_rank, use_platform
from megatron_sphinx.errors import ConfigError

_DRIVER = Path("/proc/driver/nvidia/gpus")  # where NVIDIA's driver lists them
_MOST_SECONDS = 120.0  # to import torch and to initialise CUDA


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one rank sees.

    Attributes:
        host: the name of the rank's machine.
        local_rank: which rank of its machine it is.
        gpus: UUIDs of the visible GPUs, in CUDA's order.
        reason: why torch can use none, where it says so.
        failure: why it is not known which there are; empty where it is.
        is_given: whether Slurm has given the job GPUs on this machine.
    """

    host: str
    local_rank: int
    gpus: Sequence[str] = ()
    reason: str = ""
    failure: str = ""
    is_given: bool = False

    @property
    def device(self) -> int:
        """The number of the rank's GPU among those that it sees."""
        return self.local_rank % len(self.gpus)


def assign(asked: str, sights: Sequence[Sight]) -> tuple[list[int | None], str]:
    """Decide for the whole job.

    Args:
        asked: run.device.
        sights: what each rank sees, by rank.

    Returns:
        For each rank the number of its GPU among those that it sees, or None on all for the CPU; and what the user
        must be told, empty where there is nothing.

    Raises:
        ConfigError: a rank has no GPU of its own, and run.device is cuda, or Slurm has given the job GPUs: nobody wants
            those to idle while CPUs compute; or a rank could not find out.
    """
    missing, remedy = ("", "") if asked == "cpu" else _shortage(sights)
    if asked == "auto":
        for rank, sight in enumerate(sights):
            if sight.failure:
                raise ConfigError(
                    f"run.device=auto: rank {rank} on host {sight.host} could not look for GPUs ({sight.failure}); "
                    f"give run.device=cuda or run.device=cpu"
                )
    is_wanted = asked == "cuda" or (asked == "auto" and any(sight.is_given for sight in sights))
    if is_wanted and missing:
        given = ", though Slurm has given the job GPUs" if asked == "auto" else ""
        raise ConfigError(f"run.device={asked}: {missing}{given}; {remedy}, or use run.device=cpu")
    if asked != "cpu" and not missing:
        return [sight.device for sight in sights], ""
    is_news = asked == "auto" and any(sight.gpus or sight.reason for sight in sights)
    note = f"run.device=auto: {missing}, so all ranks compute on the CPU; to compute on GPUs {remedy}"
    return [None] * len(sights), note if is_news else ""


def _shortage(sights: Sequence[Sight]) -> tuple[str, str]:
    """Which ranks have no GPU of their own, and what to do; both empty where every rank has one."""
    owners: dict[str, int] = {}
    for rank, sight in enumerate(sights):
        if not sight.gpus:
            why = f" ({sight.reason})" if sight.reason else ""
            return f"rank {rank} on host {sight.host} sees no GPU{why}", "give every host of the job GPUs"
        owner = owners.setdefault(sight.gpus[sight.device], rank)
        if owner == rank:
            continue
        beside = [other for other in sights if other.host == sight.host]
        visible = len({gpu for other in beside for gpu in other.gpus})
        if visible < len(beside):
            return (
                f"{len(beside)} ranks on host {sight.host} share {visible} GPU{'s' if visible > 1 else ''}",
                "start no more ranks on a host than it has GPUs (parallel.encoder=0 needs none for encoders)",
            )
        return (
            f"ranks {owner} and {rank} on host {sight.host} take one and the same GPU, as LOCAL_RANK is "
            f"{sights[owner].local_rank} and {sight.local_rank}",
            "start the ranks with torchrun or srun, which number those of a host",
        )
    return "", ""


def choose(asked: str, store: Store, rank: int, world: int) -> tuple[Platform, str]:
    """Agree with all ranks of the job on what each computes on, and let this process do so; called by all together.

    Args:
        asked: run.device.
        store: where the ranks meet.
        rank: of this process.
        world: ranks of the job.

    Returns:
        The platform, and what the user must be told, see `assign`.

    Raises:
        ConfigError: a rank has no GPU of its own, on all ranks; or this process computes on another device already.
    """
    known = chosen_platform() if world == 1 else None  # a program may open several runs, one after the other
    if known is not None:
        if asked not in ("auto", known.device.type):
            raise ConfigError(
                f"run.device={asked}: this process computes on {known.device.type} already; start another one for it"
            )
        return known, ""
    answer = _answer(asked, look(asked, is_alone=world == 1), store, rank, world)
    if error := answer["error"]:
        raise ConfigError(error)
    return use_platform(answer["devices"][rank]), answer["note"]


def look(asked: str, *, is_alone: bool) -> Sight:
    """What this rank sees.

    Where other ranks may yet decide for the CPU, another process asks CUDA: what has been initialised cannot be hidden
    from libraries any more. That takes seconds, and only happens for `auto` where there are GPUs.
    """
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0")
    here = Sight(host=socket.gethostname(), local_rank=local_rank(), is_given=given)
    if asked == "cpu":
        return here
    if asked == "auto" and not _may_have_gpus():
        return replace(here, reason=_reason_for_none())
    if is_alone or asked == "cuda":
        gpus, reason = visible()
        return replace(here, gpus=gpus, reason=reason)
    try:
        gpus, reason = _visible_to_another_process()
    except _LookError as error:
        return replace(here, failure=str(error))
    return replace(here, gpus=gpus, reason=reason)


class _LookError(Exception):
    """It could not be found out which GPUs there are."""


def _reason_for_none() -> str:
    """Why the driver seems to know of no GPU, where it has some that nobody has hidden."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None
    return "" if is_hidden or not any(_DRIVER.glob("*")) else "the driver has some, but does not answer for them"


def _may_have_gpus() -> bool:
    """Whether the driver knows of GPUs that are not hidden; CUDA stays as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver's library without a driver
        return torch.cuda.device_count() > 0


def visible() -> tuple[list[str], str]:
    """UUIDs of the GPUs that torch can use here, in CUDA's order, or why it can use none; this initialises CUDA."""
    try:
        torch.cuda.init()
        return [str(torch.cuda.get_device_properties(n).uuid) for n in range(torch.cuda.device_count())], ""
    except (AssertionError, RuntimeError) as error:  # torch without CUDA; no driver, or one that is too old
        return [], str(error).partition("\n")[0].rstrip(".")


def _visible_to_another_process() -> tuple[list[str], str]:
    """The answer of `visible` in a new process.

    Raises:
        _LookError: there is none.
    """
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)  # also where a program has added to it
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], capture_output=True, text=True, check=False, timeout=_MOST_SECONDS,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _LookError(f"torch took more than {_MOST_SECONDS:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise _LookError(said[-1])
    gpus, reason = json.loads(done.stdout.splitlines()[-1])
    return gpus, reason


def _answer(asked: str, mine: Sight, store: Store, rank: int, world: int) -> dict[str, Any]:
    """What the first rank decides once it knows what each rank sees: `devices`, `note` and `error`.

    It may hold the store, so it goes on when all others have read the answer.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives it
    place = PrefixStore(f"megatron_sphinx/{attempt}/devices", store)
    place.set(f"sight/{rank}", json.dumps(asdict(mine)))
    if rank == 0:
        sights = [json.loads(text) for text in place.multi_get([f"sight/{number}" for number in range(world)])]
        answer: dict[str, Any] = {"devices": [], "note": "", "error": ""}
        try:
            answer["devices"], answer["note"] = assign(asked, [Sight(**sight) for sight in sights])
        except ConfigError as error:
            answer["error"] = str(error)
        place.set("answer", json.dumps(answer))
    found: dict[str, Any] = json.loads(place.get("answer"))
    place.set(f"read/{rank}", "")
    if rank == 0:
        place.wait([f"read/{number}" for number in range(world)])
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(visible()) + "\n")
