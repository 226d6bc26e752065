"""Which rank of its job this process is, as torchrun says it, or srun, or alone."""

import os
from typing import NamedTuple

from megatron_sphinx.errors import MeetingError


class Place(NamedTuple):
    """A process among those of its job.

    Attributes:
        rank: its number.
        world: how many there are.
    """

    rank: int
    world: int


def read_number(name: str, least: int, most: int | None = None) -> int:
    """Read a whole number from the environment.

    Args:
        name: of the variable.
        least: the smallest that it may be.
        most: the largest that it may be; None for no limit.

    Raises:
        MeetingError: it is none, or out of its range.
    """
    text = os.environ.get(name, "")
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 10):
        raise MeetingError(f"{name}={text}: is no whole number; it is what a launcher such as torchrun or srun sets")
    number = int(text)
    if number < least or (most is not None and number > most):
        span = f"at least {least}" if most is None else f"from {least} to {most}"
        raise MeetingError(f"{name}={text}: must be {span}; it is what a launcher such as torchrun or srun sets")
    return number


def find_place() -> Place:
    """Find rank and world, as torchrun says them, or srun, or alone; set them for the libraries that read them again.

    Raises:
        MeetingError: Slurm has started several ranks that do not know of each other; or a number is none, or cannot be.
    """
    slurm_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    tasks = read_number(slurm_name, 1) if slurm_name in os.environ else 1
    if tasks > 1 and not {"MASTER_ADDR", "WORLD_SIZE"} & os.environ.keys():
        raise MeetingError(
            f"SLURM_NTASKS={tasks}: the ranks have nowhere to meet, each would train alone; start them by "
            f"slurm/train.sbatch or torchrun, or export MASTER_ADDR and MASTER_PORT; for one rank set WORLD_SIZE=1"
        )
    names = {"WORLD_SIZE": ("SLURM_NTASKS", "1"), "RANK": ("SLURM_PROCID", "0"), "LOCAL_RANK": ("SLURM_LOCALID", "0")}
    for name, (slurm_name, alone) in names.items():
        given = os.environ.get(slurm_name) if "MASTER_ADDR" in os.environ else None
        if name == "RANK" and given is None and name not in os.environ and read_number("WORLD_SIZE", 1) > 1:
            world = os.environ["WORLD_SIZE"]
            raise MeetingError(f"RANK=: is not set, though WORLD_SIZE={world}; start the ranks by torchrun or srun")
        os.environ.setdefault(name, alone if given is None else given)
    count = read_number("WORLD_SIZE", 1)
    hosts_ranks = read_number("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else None
    read_number("LOCAL_RANK", 0, None if hosts_ranks is None else hosts_ranks - 1)
    return Place(read_number("RANK", 0, count - 1), count)
