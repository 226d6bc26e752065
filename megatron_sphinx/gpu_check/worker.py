"""A process that does one job of the check on the device, so that its memory is free for the next one.

gpu-check starts it as `python -m megatron_sphinx.gpu_check.worker JOB.json`; what it finds goes to a file line by line.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sphinx.gpu_check import kernels, parts, steps
from megatron_sphinx.gpu_check.findings import Note, append
from megatron_sphinx.gpu_check.scales import SCALES, Scale
from megatron_sphinx.gpu_check.workload import make_data
from megatron_sphinx.parallel.place import find_place
from megatron_sphinx.run.job import join

_JOIN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process is to do.

    Attributes:
        name: kernels, ours, peer or parts.
        scale: the name of the sizes.
        device: cpu or cuda.
        folder: where data is made that all jobs share.
        out: the file that findings are written to.
        options: further arguments of the job's function.
    """

    name: str
    scale: str
    device: str
    folder: str
    out: str
    options: dict[str, Any] = field(default_factory=dict)


def do(job: Job) -> None:
    """Do a job in this process, which does nothing else."""
    find_place()
    join(job.device, _JOIN_SECONDS)
    scale, folder, note = SCALES[job.scale], Path(job.folder), partial(append, Path(job.out))
    if job.name in ("ours", "peer") and not (folder / "text.idx").exists():
        make_data(folder, scale.vocabulary)
    for work in _works(job, scale, folder, note):
        work()


def _works(job: Job, scale: Scale, folder: Path, note: Note) -> list[Callable[[], None]]:
    """List what a job consists of."""
    if job.name == "parts":
        return [partial(parts.moe, scale, note), partial(parts.encoders, scale, note)]
    if job.name == "kernels":
        return [partial(kernels.attention, scale, note), partial(kernels.features, scale, note)]
    works: dict[str, Callable[..., None]] = {"ours": steps.ours, "peer": steps.peer}
    return [partial(works[job.name], scale, folder, note, **job.options)]


def main(path: Path) -> None:
    """Do the job that a file describes."""
    do(Job(**json.loads(path.read_text())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
