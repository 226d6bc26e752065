"""Decides what each rank computes on: a GPU of its own, or else every rank of the job on the CPU.

Some launchers show a rank all GPUs of its host, some only its own, so a GPU's number says nothing: GPUs are told apart
by their UUIDs. The ranks exchange what they see before any process group exists, since its backend follows from it.
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
class VisibleDevices:
    """The GPUs that one rank sees on its machine.

    Attributes:
        host: the name of the rank's machine.
        local_rank: which rank of its machine it is.
        gpus: UUIDs of the visible GPUs, in CUDA's order.
        reason: why torch can use no GPU, where it says so.
        failure: why it could not be found out which GPUs there are; empty where it could.
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
        """The number of the rank's own GPU among those that it sees."""
        return self.local_rank % len(self.gpus)


def assign(device: str, ranks: Sequence[VisibleDevices]) -> tuple[list[int | None], str]:
    """Decide for the whole job which GPU each rank takes, or that all compute on the CPU.

    Args:
        device: what the user asks for, run.device: auto, cuda or cpu.
        ranks: what each rank sees, by rank.

    Returns:
        For each rank the number of its GPU among those that it sees, or None on all for the CPU; and what the user
        must be told, empty where there is nothing.

    Raises:
        ConfigError: a rank has no GPU of its own, and run.device is cuda, or Slurm has given the job GPUs: nobody wants
            those to idle while CPUs compute; or a rank could not find out.
    """
    missing, remedy = ("", "") if device == "cpu" else _shortage(ranks)
    if device == "auto":
        for number, seen in enumerate(ranks):
            if seen.failure:
                raise ConfigError(
                    f"run.device=auto: rank {number} on host {seen.host} could not look for GPUs ({seen.failure}); "
                    f"give run.device=cuda or run.device=cpu"
                )
    is_wanted = device == "cuda" or (device == "auto" and any(seen.is_given for seen in ranks))
    if is_wanted and missing:
        given = ", though Slurm has given the job GPUs" if device == "auto" else ""
        raise ConfigError(f"run.device={device}: {missing}{given}; {remedy}, or use run.device=cpu")
    if device != "cpu" and not missing:
        return [seen.device for seen in ranks], ""
    is_news = device == "auto" and any(seen.gpus or seen.reason for seen in ranks)
    note = f"run.device=auto: {missing}, so all ranks compute on the CPU; to compute on GPUs {remedy}"
    return [None] * len(ranks), note if is_news else ""


def _shortage(ranks: Sequence[VisibleDevices]) -> tuple[str, str]:
    """Say which ranks have no GPU of their own, and what to do; both empty where every rank has one."""
    owners: dict[str, int] = {}
    for number, seen in enumerate(ranks):
        if not seen.gpus:
            why = f" ({seen.reason})" if seen.reason else ""
            return f"rank {number} on host {seen.host} sees no GPU{why}", "give every host of the job GPUs"
        owner = owners.setdefault(seen.gpus[seen.device], number)
        if owner == number:
            continue
        neighbours = [other for other in ranks if other.host == seen.host]
        gpus = len({gpu for other in neighbours for gpu in other.gpus})
        if gpus < len(neighbours):
            return (
                f"{len(neighbours)} ranks on host {seen.host} share {gpus} GPU{'s' if gpus > 1 else ''}",
                "start no more ranks on a host than it has GPUs (parallel.encoder=0 needs none for encoders)",
            )
        return (
            f"ranks {owner} and {number} on host {seen.host} take one and the same GPU, as LOCAL_RANK is "
            f"{ranks[owner].local_rank} and {seen.local_rank}",
            "start the ranks with torchrun or srun, which number those of a host",
        )
    return "", ""


def choose(device: str, store: Store, rank: int, world: int) -> tuple[Platform, str]:
    """Agree with all ranks of the job on what each computes on, and set this process to it; called by all together.

    Args:
        device: what the user asks for, run.device: auto, cuda or cpu.
        store: where the ranks meet.
        rank: number of this process in the job.
        world: ranks of the job.

    Returns:
        The platform, and what the user must be told, as `assign` words it.

    Raises:
        ConfigError: a rank has no GPU of its own, on all ranks; or this process computes on another device already.
    """
    known = chosen_platform() if world == 1 else None  # a program may open several runs, one after the other
    if known is not None:
        if device not in ("auto", known.device.type):
            raise ConfigError(
                f"run.device={device}: this process computes on {known.device.type} already; start another one for it"
            )
        return known, ""
    decision = _decide_together(device, look(device, is_alone=world == 1), store, rank, world)
    if error := decision["error"]:
        raise ConfigError(error)
    return use_platform(decision["devices"][rank]), decision["note"]


def look(device: str, *, is_alone: bool) -> VisibleDevices:
    """Find out which GPUs this rank sees.

    Where other ranks may yet decide for the CPU, another process asks CUDA: what has been initialised cannot be hidden
    from libraries any more. That takes seconds, and only happens for `auto` where there are GPUs.

    Args:
        device: what the user asks for, run.device: auto, cuda or cpu.
        is_alone: whether this rank is the only one of the job.
    """
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0")
    seen = VisibleDevices(host=socket.gethostname(), local_rank=local_rank(), is_given=given)
    if device == "cpu":
        return seen
    if device == "auto" and not _may_have_gpus():
        return replace(seen, reason=_reason_for_none())
    if is_alone or device == "cuda":
        gpus, reason = visible()
        return replace(seen, gpus=gpus, reason=reason)
    try:
        gpus, reason = _visible_to_another_process()
    except _LookError as error:
        return replace(seen, failure=str(error))
    return replace(seen, gpus=gpus, reason=reason)


class _LookError(Exception):
    """It could not be found out which GPUs there are."""


def _reason_for_none() -> str:
    """Say why torch counts no GPU although the driver lists some that nobody has hidden; empty where it lists none."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None
    return "" if is_hidden or not any(_DRIVER.glob("*")) else "the driver has some, but does not answer for them"


def _may_have_gpus() -> bool:
    """Whether the driver knows of GPUs that are not hidden; this does not initialise CUDA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver's library without a driver
        return torch.cuda.device_count() > 0


def visible() -> tuple[list[str], str]:
    """List the UUIDs of the GPUs that torch can use, in CUDA's order, or say why it can use none; initialises CUDA."""
    try:
        torch.cuda.init()
        return [str(torch.cuda.get_device_properties(n).uuid) for n in range(torch.cuda.device_count())], ""
    except (AssertionError, RuntimeError) as error:  # torch without CUDA; no driver, or one that is too old
        return [], str(error).partition("\n")[0].rstrip(".")


def _visible_to_another_process() -> tuple[list[str], str]:
    """Call `visible` in a new process, so that CUDA is not initialised in this one.

    Raises:
        _LookError: the process failed, or took too long.
    """
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)  # also where a program has added to it
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


def _decide_together(device: str, own: VisibleDevices, store: Store, rank: int, world: int) -> dict[str, Any]:
    """Tell the first rank what this one sees, and read what it decides: `devices`, `note` and `error`.

    The first rank's process may hold the store, so it goes on only when all others have read the decision.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
    shared = PrefixStore(f"megatron_sphinx/{attempt}/devices", store)
    shared.set(f"visible/{rank}", json.dumps(asdict(own)))
    if rank == 0:
        texts = shared.multi_get([f"visible/{number}" for number in range(world)])
        ranks = [VisibleDevices(**json.loads(text)) for text in texts]
        decision: dict[str, Any] = {"devices": [], "note": "", "error": ""}
        try:
            decision["devices"], decision["note"] = assign(device, ranks)
        except ConfigError as error:
            decision["error"] = str(error)
        shared.set("decision", json.dumps(decision))
    read: dict[str, Any] = json.loads(shared.get("decision"))
    shared.set(f"read/{rank}", "")
    if rank == 0:
        shared.wait([f"read/{number}" for number in range(world)])
    return read


if __name__ == "__main__":
    sys.stdout.write(json.dumps(visible()) + "\n")
